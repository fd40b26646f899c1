"""`POST /generate`, SGLang's native route: bodies to jobs, samples to answers, whole or streamed.

Knows the native wire format; the generating is the front's.
"""

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.async_generation import AsyncGeneration
from multilora.drivers.request_driver import RequestDriver
from multilora.errors import BadRequest
from multilora.front.adapter_spec import parse_specs
from multilora.front.generation import Job, Sample
from multilora.front.prompt import Prompt, check_priority, check_timeout, prefix_salt, read_prompts, spread
from multilora.front.registry import AdapterRegistry
from multilora.front.tokenizer import Tokenizer
from multilora.front.vocabulary import Vocabularies
from multilora.params import SamplingParams, parse_logprobs_mode
from multilora.server.bodies import GenerateBody
from multilora.server.foreign_fields import sort_out
from multilora.server.resolving import resolved
from multilora.server.response_bytes import ResponseBudget
from multilora.server.streaming import EventStream, Json, close, frame, while_connected
from multilora.server.strict_route import StrictRoute
from multilora.server.weight_versions import changed_weights, weight_metadata, weight_version_spans

LARGE_FRAME = 64 << 10
"""Bytes of a frame from which on not every token gets one."""

Triple = tuple[float | None, int, str | None]  # logprob, token id, text


def router(driver: RequestDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/generate")
    async def generate(request: Request, body: GenerateBody) -> Response:
        """Generate from text or token ids, one prompt or many, each with its own adapter."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            return await answer(request, body)

    async def answer(request: Request, body: GenerateBody) -> Response:
        batch = read_batch(driver.front.registry, body)
        answers = NativeAnswers(driver.front.vocabularies, body, batch)
        budget = ResponseBudget(driver.front.config.max_response_bytes)

        async def whole() -> list[dict[str, Any]]:
            generation = await driver.generate(batch.jobs, batch.rids, budget.limit)
            return answers.in_order(await generation.results())

        if not body.stream:
            results = await while_connected(request.receive, whole())
            return budget.whole(Json(results if batch.several else results[0]))
        begun = driver.generate(batch.jobs, batch.rids, budget.limit)
        generation = await while_connected(request.receive, begun, close)
        return await EventStream.begin(request.receive, answers.frames(generation), generation.close, budget)

    return routes


@dataclass(frozen=True)
class Batch:
    """One job for each prompt. `samples`: of each; `rids`: one for each sample, those of a job are neighbours.

    `several`: the answer is a list, in which answer j to prompt i of b has index j·b + i.
    """

    jobs: list[Job]
    samples: int
    rids: list[str] | None
    several: bool

    def position(self, sample: Sample) -> int:
        """Where the answer to `sample` stands in the list of answers."""
        job = sample.index // self.samples
        return sample.number * len(self.jobs) + job


def read_batch(registry: AdapterRegistry, body: GenerateBody) -> Batch:
    """Raises BadRequest naming the field, UnknownModel, UnknownAdapter."""
    prompts, several = _prompts(body)
    count = len(prompts)
    sampling = [_sampling(p) for p in spread(body.sampling_params, count, "sampling_params")]
    samples = sampling[0].n
    if any(params.n != samples for params in sampling):
        raise BadRequest("sampling_params.n must be the same for every item of a batch", param="n")
    adapters = [registry.resolve_model(body.model, spec) for spec in parse_specs(body.lora_path, count)]
    logprob = spread(body.return_logprob, count, "return_logprob")
    start = spread(body.logprob_start_len, count, "logprob_start_len")
    top = spread(body.top_logprobs_num, count, "top_logprobs_num")
    mode = parse_logprobs_mode(body.logprobs_mode)
    salts, keys = spread(body.cache_salt, count, "cache_salt"), spread(body.extra_key, count, "extra_key")
    jobs = [
        Job(
            prompt=prompts[i],
            sampling=sampling[i],
            adapters=adapters[i],
            return_logprob=bool(logprob[i]),
            logprob_start_len=-1 if start[i] is None else start[i],
            top_logprobs_num=top[i] or 0,
            logprobs_mode=mode,
            salt=prefix_salt(salts[i], keys[i]),
            priority=check_priority(body.priority),
            timeout=check_timeout(body.timeout),
        )
        for i in range(count)
    ]
    several = several or samples > 1
    return Batch(jobs, samples, _rids(body.rid, count, samples, several), several)


def _sampling(given: dict[str, Any] | None) -> SamplingParams:
    """Null means default, for the whole object and for each of its parameters."""
    own = SamplingParams.__struct_fields__
    sort_out(given or {}, own, "sampling_params")
    return SamplingParams.parse({k: v for k, v in (given or {}).items() if k in own and v is not None})


def _prompts(body: GenerateBody) -> tuple[list[Prompt], bool]:
    if (body.text is None) == (body.input_ids is None):
        raise BadRequest("exactly one of text and input_ids must be given", param="text")
    return read_prompts(body.text, "text") if body.text is not None else read_prompts(body.input_ids, "input_ids")


def _rids(rid: str | list[str] | None, count: int, samples: int, several: bool) -> list[str] | None:
    """`#` and a number tell several samples of one rid apart: their position for a single one, else `number`."""
    if rid is None:
        return None
    if isinstance(rid, str):
        return [f"{rid}#{j * count + i}" for i in range(count) for j in range(samples)] if several else [rid]
    rids = spread(rid, count, "rid")
    return [f"{r}#{j}" for r in rids for j in range(samples)] if samples > 1 else rids


class NativeAnswers:
    """Samples as the objects of the native wire format."""

    def __init__(self, vocabularies: Vocabularies, body: GenerateBody, batch: Batch):
        self._batch = batch
        self._with_text = bool(body.return_text_in_logprobs)
        if self._with_text:
            vocabularies.base.reader("return_text_in_logprobs", "return_text_in_logprobs")

    def in_order(self, samples: list[Sample]) -> list[dict[str, Any]]:
        return [self.full(sample) for sample in sorted(samples, key=self._batch.position)]

    async def frames(self, generation: AsyncGeneration) -> AsyncGenerator[bytes, None]:
        """Each has all of a sample so far. Once they are large there is one whenever the answer has grown by 1/64, so
        that a stream is at most 64 times as long as its answer."""
        due: dict[int, float] = {}  # sample's index → tokens that its next frame has at least
        async for sample, delta in generation.events():
            tokens = sample.stream.completion_tokens
            if delta.finished is None and tokens < due.get(sample.index, 0):
                continue
            answer = self.full(sample)
            data = frame(answer | {"index": self._batch.position(sample)} if self._batch.several else answer)
            if len(data) > LARGE_FRAME:
                due[sample.index] = tokens * (1 + 1 / 64)
            yield data

    def full(self, sample: Sample) -> dict[str, Any]:
        """All of the sample so far."""
        stream = sample.stream
        meta: dict[str, Any] = {
            "id": sample.rid,
            "finish_reason": stream.finished.native() if stream.finished else None,
            "prompt_tokens": len(sample.prompt_ids),
            "completion_tokens": stream.completion_tokens,
            "cached_tokens": stream.cached_tokens,
            "queue_time": sample.queue_seconds,
            "e2e_latency": sample.seconds,
        } | weight_metadata(sample)
        meta |= {"weight_versions": weight_version_spans(sample)} if stream.finished else changed_weights(sample)
        if sample.job.return_logprob:
            meta |= self._logprobs(sample)
        return {"text": stream.text, "output_ids": stream.token_ids, "meta_info": meta}

    def _logprobs(self, sample: Sample) -> dict[str, Any]:
        stream, job = sample.stream, sample.job
        tokenizer = sample.vocabulary.tokenizer if self._with_text else None
        prompt = sample.prompt_ids[job.logprob_start_len :] if job.logprob_start_len >= 0 else []
        inputs = [None, *stream.input_logprobs[1:]] if stream.input_logprobs else []  # as SGLang, from any start
        pairs = zip(inputs, prompt, strict=False), zip(stream.logprobs, stream.token_ids, strict=False)
        found: dict[str, Any] = {}
        for side, own in zip(("input", "output"), pairs, strict=True):
            found[f"{side}_token_logprobs"] = _triples(
                [(None if one is None else one.logprob, token) for one, token in own], tokenizer
            )
        if job.top_logprobs_num:
            for side, logprobs in (("input", inputs), ("output", stream.logprobs)):
                found[f"{side}_top_logprobs"] = [
                    None if one is None else _triples(one.top, tokenizer) for one in logprobs
                ]
        return found


def _triples(pairs: Iterable[tuple[float | None, int]], tokenizer: Tokenizer | None) -> list[Triple]:
    return [(logprob, token, tokenizer.token_text(token) if tokenizer else None) for logprob, token in pairs]
