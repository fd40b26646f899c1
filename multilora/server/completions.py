"""`POST /v1/completions`: OpenAI's text completions over prompts of text or token ids, echo and logprobs included."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.engine.messages import TopLogprobs
from multilora.errors import BadRequest
from multilora.front.stream import Delta, TextStream
from multilora.front.tokenizer import Tokenizer
from multilora.server.errors import StrictRoute
from multilora.server.generation import Flight, Front, Job, Sequence
from multilora.server.openai import Reply, adapters_of, check_top_logprobs
from multilora.server.openai_bodies import CompletionBody

DEFAULT_MAX_TOKENS = 16


def router(front: Front) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Complete one prompt or many."""
        choices = Choices(front, body)
        reply = Reply(body, "cmpl", "text_completion", "text_completion")
        return await reply.send(request, front, choices.jobs, choices.whole, choices.chunks)

    return routes


class Choices:
    """The jobs of one request, and its sequences as choices: answer j to prompt i has index i·n + j."""

    def __init__(self, front: Front, body: CompletionBody):
        self._front = front
        self._body = body
        self._echo = bool(body.echo)
        self._given = self._prompts()
        adapters = adapters_of(front.registry, body, len(self._given))
        prompts = [front.vocabularies.encode(*pair, "prompt") for pair in zip(self._given, adapters, strict=True)]
        limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = body.sampling(front.sampling_defaults, limit)
        if body.best_of is not None and body.best_of != sampling.n:
            raise BadRequest(f"best_of = {body.best_of}: only the value of n is served", param="best_of")
        with_logprobs = body.logprobs is not None
        self.jobs = [
            Job(
                prompt_ids=ids,
                sampling=sampling,
                adapters=spec,
                vocabulary=vocabulary,
                sample=j,
                return_logprob=with_logprobs,
                logprob_start_len=0 if with_logprobs and self._echo else -1,
                top_logprobs_num=check_top_logprobs(body.logprobs or 0, "logprobs"),
            )
            for (ids, vocabulary), spec in zip(prompts, adapters, strict=True)
            for j in range(sampling.n)
        ]
        self._samples = sampling.n
        self._offsets: dict[int, int] = {}  # index → characters of the choice that logprobs have covered

    def _prompts(self) -> list[Any]:
        prompt: Any = self._body.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise BadRequest("prompt: the list is empty", param="prompt")
        if self._echo or self._body.logprobs is not None:
            self._front.vocabularies.base.reader("echo or logprobs", "echo")
        return list(prompt)

    def _prompt_text(self, index: int, sequence: Sequence) -> str:
        given = self._given[index // self._samples]
        if isinstance(given, str):
            return given
        tokenizer = sequence.vocabulary.reader("echo", "echo")
        return tokenizer.decode(given, skip_special_tokens=sequence.job.sampling.skip_special_tokens)

    def whole(self, index: int, sequence: Sequence) -> dict[str, Any]:
        return self._choice(index, sequence, sequence.stream, first=True)

    async def chunks(self, flight: Flight) -> AsyncGenerator[dict[str, Any], None]:
        begun: set[int] = set()
        async for index, delta in flight.events():
            choice = self._choice(index, flight.sequences[index], delta, first=index not in begun)
            begun.add(index)
            if choice["text"] or choice["finish_reason"] or (choice["logprobs"] and choice["logprobs"]["tokens"]):
                yield choice

    def _choice(self, index: int, sequence: Sequence, part: TextStream | Delta, *, first: bool) -> dict[str, Any]:
        """`part`: all of the answer or what is new of it; `first`: the echo comes before it."""
        text, tokens = part.text, part.token_ids
        logprobs: list[float | None] = [*(part.logprobs or ())]
        top: list[TopLogprobs | None] = [*(part.top_logprobs or ())]
        if self._echo and first:
            text = self._prompt_text(index, sequence) + text
            tokens = [*sequence.job.prompt_ids, *tokens]
            logprobs = [*(part.input_logprobs or ()), *logprobs]
            top = [*(part.input_top_logprobs or ()), *top]
        finished = part.finished.openai() if part.finished else None
        found = None
        if self._body.logprobs is not None:
            found = self._logprobs(index, sequence.vocabulary.reader("logprobs", "logprobs"), tokens, logprobs, top)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finished}

    def _logprobs(
        self,
        index: int,
        tokenizer: Tokenizer,
        tokens: list[int],
        logprobs: list[float | None],
        top: list[TopLogprobs | None],
    ) -> dict[str, Any]:
        texts = [tokenizer.token_text(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(text)

        def named(entry: TopLogprobs | None) -> dict[str, float] | None:
            return None if entry is None else {tokenizer.token_text(token): logprob for logprob, token in entry}

        tops = [named(entry) for entry in top] if self._body.logprobs else None
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
