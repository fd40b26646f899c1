"""The road of a request that reads prompts: bodies to jobs, jobs through the engine, what answers say of all.

The routes of this package say what is wanted of a prompt and how the numbers are written.
"""

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from fastapi import Request, Response

from multilora.drivers.async_generation import AsyncGeneration
from multilora.drivers.request_driver import RequestDriver
from multilora.front.adapter_spec import parse_specs
from multilora.front.effects import Lane
from multilora.front.embedding import READ_ONLY
from multilora.front.generation import Job, Sample
from multilora.front.prompt import Prompt, check_priority, check_timeout
from multilora.front.request_front import RequestFront
from multilora.params import PoolingParams
from multilora.server.pooling.bodies import ReadBody
from multilora.server.response_bytes import ResponseBudget
from multilora.server.streaming import while_connected
from multilora.server.weight_versions import weight_metadata

INLINE_NUMBERS = 1 << 14
"""Numbers of an answer that are written on the event loop, in a millisecond; more are written on a thread."""


def read_jobs(
    front: RequestFront, body: ReadBody, prompts: Sequence[Prompt], pooling: PoolingParams, ids_param: str = "input"
) -> list[Job]:
    """One job for each prompt. Raises UnknownModel, UnknownAdapter, BadRequest."""
    count = len(prompts)
    specs = [front.registry.resolve_model(body.model, spec) for spec in parse_specs(body.lora_path, count)]
    priority, timeout = check_priority(body.priority), check_timeout(body.timeout)
    return [
        Job(
            prompt=prompt,
            sampling=READ_ONLY,
            pooling=pooling,
            adapters=spec,
            salt=salt,
            priority=priority,
            timeout=timeout,
            ids_param=ids_param,
        )
        for prompt, spec, salt in zip(prompts, specs, body.salts(count), strict=True)
    ]


async def respond(
    request: Request,
    driver: RequestDriver,
    jobs: Sequence[Job],
    rids: Sequence[str] | None,
    answer: Callable[[AsyncGeneration], Any],
    numbers: int,
) -> Response:
    """Read prompts, and send what `answer` makes of the samples, which have ended. numbers: about, in all of it."""

    def written(generation: AsyncGeneration) -> bytes:
        return msgspec.json.encode(answer(generation))

    async def work() -> bytes:
        generation = await driver.generate(jobs, rids)
        await generation.results()
        if numbers <= INLINE_NUMBERS:
            return written(generation)
        return await driver.run_blocking(Lane.LONG_TEXT, lambda: written(generation))

    response = Response(await while_connected(request.receive, work()), media_type="application/json")
    return ResponseBudget(driver.front.config.max_response_bytes).whole(response)


def usage(samples: Sequence[Sample]) -> dict[str, Any]:
    """Token counts: nothing is generated."""
    read = sum(len(sample.prompt_ids) for sample in samples)
    cached = sum(sample.stream.cached_tokens for sample in samples)
    return {
        "prompt_tokens": read,
        "total_tokens": read,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def listing(
    generation: AsyncGeneration, body: ReadBody, front: RequestFront, prefix: str, data: list[dict[str, Any]]
) -> dict[str, Any]:
    """An answer in OpenAI's form of a list, as vLLM writes it. prefix: of its id."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(generation.created),
        "model": front.config.model_name if body.model is None else body.model,
        "data": data,
        "usage": usage(generation.samples),
        "metadata": weight_metadata(generation.samples[0]),
    }


def meta_info(sample: Sample) -> dict[str, Any]:
    """What SGLang's native routes say beside the numbers."""
    stream = sample.stream
    return {
        "id": sample.rid,
        "finish_reason": stream.finished.native() if stream.finished else None,
        "prompt_tokens": len(sample.prompt_ids),
        "cached_tokens": stream.cached_tokens,
        "queue_time": sample.queue_seconds,
        "e2e_latency": sample.seconds,
    } | weight_metadata(sample)
