"""`POST /v1/completions`: OpenAI's text completions over prompts of text or token ids, echo and logprobs included."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.request_driver import RequestDriver
from multilora.engine.messages import Logprobs
from multilora.errors import BadRequest
from multilora.front.generation import Job, Sample
from multilora.front.prompt import TextPrompt, read_prompts
from multilora.front.request_front import RequestFront
from multilora.front.stream import Delta, TextStream
from multilora.server.constraints import in_the_clients_field
from multilora.server.dialects import in_words_of
from multilora.server.foreign_fields import REASONS
from multilora.server.openai import Choice, OpenAIRequest, adapters_of, check_top_logprobs, common_fields
from multilora.server.openai_bodies import CompletionBody
from multilora.server.resolving import resolved
from multilora.server.strict_route import StrictRoute

DEFAULT_MAX_TOKENS = 16


def router(driver: RequestDriver, sampling_defaults: dict[str, Any]) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Complete one prompt or many."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            with in_words_of(body.words), in_the_clients_field(body.constraint()):
                return await CompletionRequest(driver.front, body, sampling_defaults).respond(request, driver)

    return routes


class CompletionRequest(OpenAIRequest):
    """One or more prompts: sample j of prompt i is the choice of index i·n + j."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    prompt_in_head = False

    def __init__(self, front: RequestFront, body: CompletionBody, sampling_defaults: dict[str, Any]):
        prompts, _ = read_prompts(body.prompt, "prompt")
        if body.add_special_tokens is False:
            prompts = [replace(p, add_special_tokens=False) if isinstance(p, TextPrompt) else p for p in prompts]
        top = body.top_logprobs
        if body.echo or top is not None:
            front.vocabularies.base.reader("echo or logprobs", "echo")
        adapters = adapters_of(front.registry, body, len(prompts))
        sampling = body.sampling(
            sampling_defaults, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        )
        if body.best_of is not None and body.best_of != sampling.n:
            reason = f"only the value of n is served: {REASONS['best_of']}"
            raise BadRequest(f"best_of = {body.best_of}: {reason}", param="best_of")
        fields = common_fields(front, body)
        jobs = [
            Job(
                prompt=prompt,
                ids_param="prompt",
                sampling=sampling,
                adapters=spec,
                return_logprob=top is not None,
                logprob_start_len=0 if top is not None and body.echo else -1,
                top_logprobs_num=check_top_logprobs(front, top or 0, "logprobs"),
                salt=salt,
                **fields,
            )
            for prompt, spec, salt in zip(prompts, adapters, body.salts(len(prompts)), strict=True)
        ]
        super().__init__(body, jobs, front.config.model_name)
        self._echo = bool(body.echo)
        self._offsets: dict[int, int] = {}  # sample's index → characters of the choice that logprobs have covered

    def whole(self, sample: Sample) -> Choice:
        return self._choice(sample, sample.stream, first=True)

    def chunks(self, sample: Sample, delta: Delta, *, first: bool) -> Iterator[Choice]:
        choice = self._choice(sample, delta, first=first)
        logprobs = choice["logprobs"]
        texts, ids = logprobs and logprobs["tokens"], choice.get("token_ids")
        if choice["text"] or choice["finish_reason"] or ids or texts or "prompt_logprobs" in choice:
            yield choice

    def text_choice(self, sample: Sample, text: str) -> Choice | None:
        if sample.job.return_logprob or self._body.return_token_ids:
            return None
        return self._choice(sample, Delta(text, []), first=False)

    def _choice(self, sample: Sample, part: TextStream | Delta, *, first: bool) -> Choice:
        """`part`: all of the answer or what is new of it; `first`: the echo comes before it."""
        text, tokens = part.text, part.token_ids
        logprobs: list[Logprobs | None] = [*part.logprobs]
        if self._echo and first:
            text = _prompt_text(sample) + text
            tokens = [*sample.prompt_ids, *tokens]
            logprobs = [*part.input_logprobs, *logprobs]
        facts = self._token_ids(part) | (self._prompt_facts(sample) if first else {})
        return facts | {
            "index": sample.index,
            "text": text,
            "logprobs": self._logprobs(sample, tokens, logprobs) if sample.job.return_logprob else None,
            "finish_reason": part.finished.openai() if part.finished else None,
        }

    def _logprobs(self, sample: Sample, tokens: list[int], logprobs: list[Logprobs | None]) -> dict[str, Any]:
        text_of = sample.vocabulary.reader("logprobs", "logprobs").token_text
        texts = [text_of(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.setdefault(sample.index, 0))
            self._offsets[sample.index] += len(text)

        def top_of(one: Logprobs | None) -> dict[str, float] | None:
            if one is None:
                return None
            best = one.top[: sample.job.top_logprobs_num]
            return {self._token_name(token, text_of(token)): logprob for logprob, token in best}

        return {
            "tokens": [self._token_name(*pair) for pair in zip(tokens, texts, strict=True)],
            "token_logprobs": [None if one is None else one.logprob for one in logprobs],
            "top_logprobs": [top_of(one) for one in logprobs] if sample.job.top_logprobs_num else None,
            "text_offset": offsets,
        }


def _prompt_text(sample: Sample) -> str:
    """As the client gave it, or its ids as text."""
    given = sample.job.prompt
    if isinstance(given, TextPrompt):
        return given.text
    tokenizer = sample.vocabulary.reader("echo", "echo")
    return tokenizer.decode(sample.prompt_ids, skip_special_tokens=sample.job.sampling.skip_special_tokens)
