"""What the OpenAI routes share, and `/v1/models`.

`completions.py` and `chat.py` say what their bodies ask for and what a choice looks like; here is what both say in
the same words: the adapter that `model` means, usage counts, the head of a response or chunk, the road of a request
through HTTP.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import msgspec
from fastapi import APIRouter, Request, Response

from multilora.drivers.async_generation import AsyncGeneration
from multilora.drivers.request_driver import RequestDriver
from multilora.errors import BadRequest, UnknownModel
from multilora.front.adapter_spec import AdapterSpec, parse_specs
from multilora.front.adapter_view import seen_adapters
from multilora.front.effects import Lane
from multilora.front.front import Front
from multilora.front.generation import Job, Sample
from multilora.front.prompt import check_priority, check_timeout
from multilora.front.registry import AdapterRegistry
from multilora.front.request_front import RequestFront
from multilora.front.stream import Delta, TextStream
from multilora.front.versions import VersionLabel
from multilora.params import parse_logprobs_mode
from multilora.server.chunk_writer import ChunkWriter
from multilora.server.openai_bodies import OpenAIBody
from multilora.server.prompt_logprobs import prompt_logprobs
from multilora.server.response_bytes import ResponseBudget
from multilora.server.streaming import EventStream, Json, close, while_connected
from multilora.server.strict_route import StrictRoute
from multilora.server.weight_versions import changed_weights, weight_metadata, weight_version_spans

Choice = dict[str, Any]


class OpenAIRequest(ABC):
    """One request of either route: its jobs, its response. Made by reading the body. Raises BadRequest.

    model_name: what a response says where the body names no model.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]  # `object` of a whole response
    chunk_kind: ClassVar[str]
    prompt_in_head: ClassVar[bool]  # what is said of the prompt; else in the choices

    def __init__(self, body: OpenAIBody, jobs: list[Job], model_name: str):
        self._body = body
        self._jobs = jobs
        self._id = body.rid or f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._model = model_name if body.model is None else body.model
        self._include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage

    @abstractmethod
    def whole(self, sample: Sample) -> Choice:
        """A finished sample as the choice of a response."""

    @abstractmethod
    def chunks(self, sample: Sample, delta: Delta, *, first: bool) -> Iterator[Choice]:
        """The choices of a stream that `delta` makes, one for each frame. first: the sample's first delta."""

    def text_choice(self, sample: Sample, text: str) -> Choice | None:  # noqa: ARG002 - the contract
        """The choice of the one chunk that any delta with this text makes, unless it is the sample's first or its
        last. None: there may be none or several, or they say more than the text."""
        return None

    def _prompt_facts(self, sample: Sample) -> dict[str, Any]:
        """What a response or its choices say of the prompt of `sample`, as far as the client asks for it."""
        facts: dict[str, Any] = {"prompt_token_ids": sample.prompt_ids} if self._body.return_token_ids else {}
        if sample.job.prompt_logprobs is not None:
            facts["prompt_logprobs"] = prompt_logprobs(sample)
        return facts

    def _token_ids(self, part: TextStream | Delta) -> dict[str, Any]:
        """What a choice says of its tokens, when the client asks for that."""
        return {"token_ids": part.token_ids} if self._body.return_token_ids else {}

    def _spans(self, sample: Sample) -> dict[str, Any]:
        """What the last that is said of a choice says of the weights, when the client asks for that or they have
        changed in the middle."""
        if self._body.return_weight_versions:
            return {"weight_versions": weight_version_spans(sample)}
        return changed_weights(sample)

    def _token_name(self, token: int, text: str) -> str:
        """The token in the logprobs: its text or, when the client asks for that, its id."""
        return f"token_id:{token}" if self._body.return_tokens_as_token_ids else text

    async def respond(self, request: Request, driver: RequestDriver) -> Response:
        """Generate, and answer in one piece or as a stream."""
        rid = self._body.rid
        rids = None if rid is None else [rid]
        count = sum(job.sampling.n for job in self._jobs)
        if rid is not None and count > 1:
            rids = [f"{rid}#{i}" for i in range(count)]
        budget = ResponseBudget(driver.front.config.max_response_bytes)

        async def answer() -> dict[str, Any]:
            generation = await driver.generate(self._jobs, rids, budget.limit)
            samples = await generation.results()
            if self._body.prompt_logprobs is None:
                return self._response(generation, samples)
            # the logprobs of a long prompt take too long for the event loop
            return await driver.run_blocking(Lane.TEXT, partial(self._response, generation, samples))

        if not self._body.stream:
            return budget.whole(Json(await while_connected(request.receive, answer())))
        begun = driver.generate(self._jobs, rids, budget.limit)
        generation = await while_connected(request.receive, begun, close)
        frames = self._frames(generation, ChunkWriter.of(request.scope), budget)
        return await EventStream.begin(request.receive, frames, generation.close, budget)

    def _response(self, generation: AsyncGeneration, samples: Sequence[Sample]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self.whole(sample) | self._spans(sample) for sample in samples]
        rest = {"choices": choices, "usage": _usage(generation.samples)}
        first = generation.samples[0]
        facts = self._prompt_facts(first) if self.prompt_in_head else {}
        return self._head(generation, self.kind) | rest | facts | {"metadata": weight_metadata(first)}

    async def _frames(
        self, generation: AsyncGeneration, writer: ChunkWriter | None, budget: ResponseBudget
    ) -> AsyncGenerator[bytes, None]:
        """What comes after the first of them, and can be written at once, bypasses them. Each is what has come since
        the one before it: several chunks, where the client reads slowly."""
        chunks = _Chunks(self._head(generation, self.chunk_kind))
        frames: dict[int, _TextFrame | None] = {}  # of the samples that have begun, by their index

        def frames_of(sample: Sample, delta: Delta) -> bytes:
            first = sample.index not in frames
            if first:
                frames[sample.index] = self._text_frame(chunks, sample)
            elif delta.finished is None and (frame := frames[sample.index]) is not None:
                return frame.with_text(delta.text) if delta.text else b""
            return b"".join(self._frames_of(chunks, sample, delta, first=first))

        def write(sample: Sample, delta: Delta) -> None:
            assert writer is not None
            if data := frames_of(sample, delta):
                writer.write(budget.spend(data))

        diverted = writer is None
        while (events := await generation.take()) is not None:
            if data := b"".join([frames_of(*event) for event in events]):
                yield data
                if writer is not None and not diverted:  # the head of the answer has been sent
                    generation.divert(writer.ready, write)
                    diverted = True
        if self._include_usage:
            yield chunks.frame(None, {"usage": _usage(generation.samples)})

    def _text_frame(self, chunks: "_Chunks", sample: Sample) -> "_TextFrame | None":
        choice = None if self._continuous_usage else self.text_choice(sample, _TEXT)
        return None if choice is None else _TextFrame(chunks.frame(choice, self._unsaid_usage))

    @property
    def _unsaid_usage(self) -> dict[str, Any]:
        """What stands for the counts in all chunks but the last, when only that has them."""
        return {"usage": None} if self._include_usage else {}

    def _frames_of(self, chunks: "_Chunks", sample: Sample, delta: Delta, *, first: bool) -> Iterator[bytes]:
        extra = {"usage": _usage([sample])} if self._continuous_usage else self._unsaid_usage
        prompt = self._prompt_facts(sample) if first and self.prompt_in_head else {}
        for choice in self.chunks(sample, delta, first=first):
            rest = extra
            if choice["finish_reason"]:
                choice |= self._spans(sample)
                rest = extra | prompt | {"metadata": weight_metadata(sample)}
            elif prompt:
                rest = extra | prompt
            yield chunks.frame(choice, rest)
            prompt = {}

    def _head(self, generation: AsyncGeneration, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": int(generation.created), "model": self._model}


class _Chunks:
    """The frames of one stream. What is the same in each, `head`, is encoded once."""

    def __init__(self, head: dict[str, Any]):
        self._begin = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['

    def frame(self, choice: Choice | None, rest: dict[str, Any]) -> bytes:
        """choice: None: there is none; rest: what follows the choices."""
        encoded = b"" if choice is None else msgspec.json.encode(choice)
        if not rest:
            return self._begin + encoded + b"]}\n\n"
        return self._begin + encoded + b"]," + msgspec.json.encode(rest)[1:] + b"\n\n"


_TEXT = "\x00"
"""Stands for the text of a `_TextFrame` until it has one. Nothing of a frame that may be like it comes after it."""
_encode = msgspec.json.Encoder().encode


class _TextFrame:
    """A frame that is the same for each text, but for the text: encoded once, with `_TEXT` for it."""

    def __init__(self, frame: bytes):
        self._begin, mark, self._end = frame.rpartition(msgspec.json.encode(_TEXT))
        assert mark, "a choice without the text that it is made for"

    def with_text(self, text: str) -> bytes:
        """The same bytes as `_Chunks.frame` would make."""
        return self._begin + _encode(text) + self._end


def _usage(samples: Sequence[Sample]) -> dict[str, Any]:
    """Token counts so far. Each prompt counts once, however many answers it has."""
    prompts = list({id(sample.job): sample for sample in samples}.values())
    read = sum(len(sample.prompt_ids) for sample in prompts)
    generated = sum(sample.stream.completion_tokens for sample in samples)
    return {
        "prompt_tokens": read,
        "completion_tokens": generated,
        "total_tokens": read + generated,
        "prompt_tokens_details": {"cached_tokens": sum(sample.stream.cached_tokens for sample in prompts)},
    }


def adapters_of(registry: AdapterRegistry, body: OpenAIBody, prompts: int) -> list[AdapterSpec]:
    """The adapters of each prompt, by `model` and `lora_path`. Raises UnknownModel, UnknownAdapter, BadRequest."""
    return [registry.resolve_model(body.model, spec) for spec in parse_specs(body.lora_path, prompts)]


def common_fields(front: RequestFront, body: OpenAIBody) -> dict[str, Any]:
    """The fields of `Job` that both routes' bodies fill in the same way. Raises BadRequest."""
    of_prompt = body.prompt_logprobs
    return {
        "prompt_logprobs": None if of_prompt is None else check_top_logprobs(front, of_prompt, "prompt_logprobs"),
        "logprobs_mode": parse_logprobs_mode(body.logprobs_mode),
        "priority": check_priority(body.priority),
        "timeout": check_timeout(body.timeout),
    }


def check_top_logprobs(front: RequestFront, count: int, field: str) -> int:
    most = front.config.max_logprobs
    if not 0 <= count <= most:
        raise BadRequest(f"{field} = {count}: must be 0 to {most} (--max-logprobs)", param=field)
    return count


def models_router(front: Front, created: int) -> APIRouter:
    """GET /v1/models: base first, then the adapters."""
    routes = APIRouter(route_class=StrictRoute)
    registry = front.registry

    def card(name: str, root: str, parent: str | None, label: VersionLabel) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "multilora",
            "root": root,
            "parent": parent,
            "max_model_len": front.engine.ready.context_length,
            "version": label.lora_version,
            "weight_version": label.weight_version,
        }

    def cards() -> list[dict[str, Any]]:
        base = registry.model_name
        seen = seen_adapters(registry)
        adapters = [card(one.name, one.path, base, registry.label_of(one.ref)) for one in seen]
        return [card(base, front.config.model_path or base, None, VersionLabel(registry.weight_version)), *adapters]

    @routes.get("/v1/models")
    async def models() -> Response:
        """The base model and every loaded adapter."""
        return Json({"object": "list", "data": cards()})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The base model or one adapter."""
        for found in cards():
            if found["id"] in (name, name.removeprefix(f"{registry.model_name}:")):
                return Json(found)
        raise UnknownModel(f"model {name!r} does not exist", param="model")

    return routes
