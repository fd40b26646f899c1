"""What the OpenAI routes share, and `/v1/models`.

Bodies to jobs are the business of `completions.py` and `chat.py`; here is what both say in the same words:
the adapter that `model` means, usage counts, the head of a response or chunk, the road of a request through HTTP.
"""

import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.errors import BadRequest, UnknownModel
from multilora.front.adapter_spec import AdapterSpec, parse_specs
from multilora.front.registry import AdapterRegistry
from multilora.server.errors import StrictRoute
from multilora.server.generation import Flight, Front, Job, Sequence
from multilora.server.openai_bodies import OpenAIBody
from multilora.server.streaming import EventStream, Json, frame, while_connected

MAX_TOP_LOGPROBS = 20


class Reply:
    """One response of either route: its id, its head, its usage.

    `whole` and `chunks` are what the route adds: all of the flight as the choices of a response, and the choices of
    one chunk each.
    """

    def __init__(self, body: OpenAIBody, prefix: str, kind: str, chunk_kind: str):
        self.body = body
        self.id = body.rid or f"{prefix}-{uuid.uuid4().hex}"
        self._kinds = (kind, chunk_kind)

    def head(self, flight: Flight, *, chunk: bool) -> dict[str, Any]:
        head = {"id": self.id, "object": self._kinds[chunk], "created": int(flight.created)}
        return head | {"model": self.body.model}

    def usage(self, flight: Flight) -> dict[str, Any]:
        """Each prompt counts once, however many answers it has."""
        sequences = flight.sequences
        prompts = sum(len(s.job.prompt_ids) for s in sequences if s.job.sample == 0)
        cached = sum(s.stream.cached_tokens for s in sequences if s.job.sample == 0)
        generated = sum(s.stream.completion_tokens for s in sequences)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": generated,
            "total_tokens": prompts + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def send(
        self,
        request: Request,
        front: Front,
        jobs: list[Job],
        whole: Callable[[int, Sequence], dict[str, Any]],
        chunks: Callable[[Flight], AsyncGenerator[dict[str, Any], None]],
    ) -> Response:
        """Generate, and answer in one piece or as a stream. `whole`: one finished sequence as a choice; `chunks`:
        the choices of a stream, as they come."""
        include_usage = self.body.include_usage
        rids = None if self.body.rid is None else [self.body.rid]
        if rids and len(jobs) > 1:
            rids = [f"{self.body.rid}#{i}" for i in range(len(jobs))]

        async def answer() -> dict[str, Any]:
            flight = await front.start(jobs, rids)
            choices = [whole(i, sequence) for i, sequence in enumerate(await flight.results())]
            return self.head(flight, chunk=False) | {"choices": choices, "usage": self.usage(flight)}

        async def frames(flight: Flight) -> AsyncGenerator[bytes, None]:
            head = self.head(flight, chunk=True)
            extra = {"usage": None} if include_usage else {}
            async for choice in chunks(flight):
                yield frame(head | {"choices": [choice]} | extra)
            if include_usage:
                yield frame(head | {"choices": [], "usage": self.usage(flight)})

        if not self.body.stream:
            return Json(await while_connected(request.receive, answer()))
        flight = await while_connected(request.receive, front.start(jobs, rids))
        return await EventStream.begin(request.receive, frames(flight), flight.close)


def adapters_of(registry: AdapterRegistry, body: OpenAIBody, prompts: int) -> list[AdapterSpec]:
    """The adapters of each prompt, by `model` and `lora_path`. Raises UnknownModel, UnknownAdapter, BadRequest."""
    return [registry.resolve_model(body.model, spec) for spec in parse_specs(body.lora_path, prompts)]


def check_top_logprobs(count: int, field: str) -> int:
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise BadRequest(f"{field} = {count}: must be 0 to {MAX_TOP_LOGPROBS}", param=field)
    return count


def models_router(front: Front, created: int) -> APIRouter:
    """GET /v1/models: base first, then the adapters."""
    routes = APIRouter(route_class=StrictRoute)
    registry = front.registry

    def card(name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "multilora",
            "root": root,
            "parent": parent,
            "max_model_len": front.client.ready.context_length,
        }

    def cards() -> list[dict[str, Any]]:
        base = registry.model_name
        adapters = [card(name, path, base) for name, path in registry.loaded().items()]
        return [card(base, front.config.model_path or base, None), *adapters]

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
