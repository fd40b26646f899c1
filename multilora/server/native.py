"""`POST /generate`, SGLang's native route: bodies to jobs, sequences to answers, whole or streamed.

Knows the native wire format; the generating is `generation.Front`'s.
"""

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.engine.messages import TopLogprobs
from multilora.errors import BadRequest
from multilora.front.adapter_spec import parse_specs
from multilora.front.tokenizer import Tokenizer
from multilora.params import SamplingParams
from multilora.server.bodies import GenerateBody
from multilora.server.errors import StrictRoute
from multilora.server.generation import Flight, Front, Job, Sequence
from multilora.server.streaming import EventStream, Json, frame, while_connected

Triple = tuple[float | None, int, str | None]  # logprob, token id, text


def router(front: Front) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/generate")
    async def generate(request: Request, body: GenerateBody) -> Response:
        """Generate from text or token ids, one prompt or many, each with its own adapter."""
        plan = make_plan(front, body)
        answers = Answers(front, body)

        async def whole() -> list[dict[str, Any]]:
            flight = await front.start(plan.jobs, plan.rids)
            return [answers.full(sequence) for sequence in await flight.results()]

        if not body.stream:
            results = await while_connected(request.receive, whole())
            return Json(results if plan.batch else results[0])
        flight = await while_connected(request.receive, front.start(plan.jobs, plan.rids))
        return await EventStream.begin(request.receive, answers.frames(flight, plan.batch), flight.close)

    return routes


@dataclass(frozen=True)
class Plan:
    """`batch`: the answer is a list. Job j·b + i is answer j to prompt i of b."""

    jobs: list[Job]
    rids: list[str] | None
    batch: bool


def make_plan(front: Front, body: GenerateBody) -> Plan:
    """Raises BadRequest naming the field."""
    prompts, batch = _prompts(body)
    count = len(prompts)
    sampling = [SamplingParams.parse(p) for p in _spread(body.sampling_params, count, "sampling_params")]
    samples = sampling[0].n
    if any(params.n != samples for params in sampling):
        raise BadRequest("sampling_params.n must be the same for every item of a batch", param="n")
    adapters = parse_specs(body.lora_path, count)
    encoded = [front.vocabularies.encode(*pair, "text") for pair in zip(prompts, adapters, strict=True)]
    logprob = _spread(body.return_logprob, count, "return_logprob")
    start = _spread(body.logprob_start_len, count, "logprob_start_len")
    top = _spread(body.top_logprobs_num, count, "top_logprobs_num")
    jobs = [
        Job(
            prompt_ids=encoded[i][0],
            sampling=sampling[i],
            adapters=adapters[i],
            vocabulary=encoded[i][1],
            sample=j,
            return_logprob=bool(logprob[i]),
            logprob_start_len=-1 if start[i] is None else start[i],
            top_logprobs_num=top[i] or 0,
        )
        for j in range(samples)
        for i in range(count)
    ]
    batch = batch or samples > 1
    return Plan(jobs, _rids(body.rid, count, samples, batch), batch)


def _prompts(body: GenerateBody) -> tuple[list[Any], bool]:
    """Text or token ids of each prompt, and whether a list was given."""
    if (body.text is None) == (body.input_ids is None):
        raise BadRequest("exactly one of text and input_ids must be given", param="text")
    if body.text is not None:
        batch = isinstance(body.text, list)
        prompts: list[Any] = body.text if isinstance(body.text, list) else [body.text]
    else:
        given: list[Any] = body.input_ids or []
        batch = bool(given) and isinstance(given[0], list)
        prompts = given if batch else [given]
    if not prompts:
        raise BadRequest("text: the list is empty", param="text")
    return prompts, batch


def _spread(value: Any, count: int, name: str) -> list[Any]:
    """One value per item: a list has the right length already, anything else is for all."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} entries for {count} inputs", param=name)
    return value


def _rids(rid: str | list[str] | None, count: int, samples: int, batch: bool) -> list[str] | None:
    if rid is None:
        return None
    if isinstance(rid, str):
        return [f"{rid}#{index}" for index in range(count * samples)] if batch else [rid]
    rids = _spread(rid, count, "rid")
    return [f"{r}#{j}" for j in range(samples) for r in rids] if samples > 1 else rids


class Answers:
    """Sequences as the objects of the native wire format."""

    def __init__(self, front: Front, body: GenerateBody):
        self._with_text = bool(body.return_text_in_logprobs)
        if self._with_text:
            front.vocabularies.base.reader("return_text_in_logprobs", "return_text_in_logprobs")

    async def frames(self, flight: Flight, batch: bool) -> AsyncGenerator[bytes, None]:
        async for index, _ in flight.events():
            answer = self.full(flight.sequences[index])
            yield frame(answer | {"index": index} if batch else answer)

    def full(self, sequence: Sequence) -> dict[str, Any]:
        """All of the sequence so far."""
        stream = sequence.stream
        meta: dict[str, Any] = {
            "id": sequence.rid,
            "finish_reason": stream.finished.native() if stream.finished else None,
            "prompt_tokens": len(sequence.job.prompt_ids),
            "weight_version": "default",
            "completion_tokens": stream.completion_tokens,
            "cached_tokens": stream.cached_tokens,
            "queue_time": sequence.queue_seconds,
            "e2e_latency": sequence.seconds,
        }
        if sequence.job.return_logprob:
            meta |= self._logprobs(sequence)
        return {"text": stream.text, "output_ids": stream.token_ids, "meta_info": meta}

    def _logprobs(self, sequence: Sequence) -> dict[str, Any]:
        stream, job = sequence.stream, sequence.job
        tokenizer = sequence.vocabulary.tokenizer if self._with_text else None
        prompt = job.prompt_ids[job.logprob_start_len :] if job.logprob_start_len >= 0 else []
        found: dict[str, Any] = {
            "input_token_logprobs": _triples(zip(stream.input_logprobs or [], prompt, strict=False), tokenizer),
            "output_token_logprobs": _triples(zip(stream.logprobs or [], stream.token_ids, strict=False), tokenizer),
        }
        if job.top_logprobs_num:
            found["input_top_logprobs"] = [_top(top, tokenizer) for top in stream.input_top_logprobs or []]
            found["output_top_logprobs"] = [_top(top, tokenizer) for top in stream.top_logprobs or []]
        return found


def _top(top: TopLogprobs | None, tokenizer: Tokenizer | None) -> list[Triple] | None:
    return None if top is None else _triples(top, tokenizer)


def _triples(pairs: Iterable[tuple[float | None, int]], tokenizer: Tokenizer | None) -> list[Triple]:
    return [(logprob, token, tokenizer.token_text(token) if tokenizer else None) for logprob, token in pairs]
