"""`POST /inference/v1/generate`: token ids in and out, vLLM's route for rollouts, whole or streamed.

The body's `sampling_params` have vLLM's names. An answer says of each token both what vLLM says (`token_id`) and what
clients of its older releases parse (`token`: "token_id:7"); every logprob is finite. The road of a request is that of
the OpenAI routes.
"""

import uuid
from collections.abc import Iterator
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field

from multilora.drivers.async_generation import AsyncGeneration
from multilora.drivers.request_driver import RequestDriver
from multilora.engine.messages import Logprobs
from multilora.errors import BadRequest
from multilora.front.admission import check_rid
from multilora.front.generation import Job, Sample
from multilora.front.request_front import RequestFront
from multilora.front.stream import Delta, FinishReason, TextStream
from multilora.server.bodies import Body, Integer, TokenIds
from multilora.server.constraints import in_the_clients_field
from multilora.server.dialects import in_words_of
from multilora.server.openai import Choice, OpenAIRequest, adapters_of, check_top_logprobs, common_fields
from multilora.server.openai_bodies import SAMPLING_WORDS, OpenAIBody, StreamOptions
from multilora.server.resolving import resolved
from multilora.server.strict_route import StrictRoute
from multilora.server.weight_versions import weight_version_spans

LOWEST = -1e30
"""Said of a token that cannot come (its logprob is minus infinity or not a number): clients want finite numbers."""


class TokenSampling(OpenAIBody):
    """`sampling_params`; of `TokenGenerateBody` they get what the OpenAI routes have beside them."""

    where = "sampling_params"
    logprobs: bool | Integer | None = None


class TokenGenerateBody(Body):
    """`POST /inference/v1/generate`."""

    where = "/inference/v1/generate"
    handed_on: ClassVar = ("model", "stream", "stream_options", "return_token_ids", "cache_salt", "priority")
    prompt_fields = ("token_ids",)
    token_ids: TokenIds = Field(min_length=1)
    sampling_params: TokenSampling | None = None
    request_id: str | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: Any = None
    priority: Integer | None = None

    def common(self) -> TokenSampling:
        """The request in the words of the OpenAI routes. Raises BadRequest."""
        params = self.sampling_params or TokenSampling()
        for name in self.handed_on:
            if getattr(params, name) is not None:
                raise BadRequest(f"sampling_params.{name}: belongs beside sampling_params", param=name)
        return params.model_copy(update={name: getattr(self, name) for name in self.handed_on})


def router(driver: RequestDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/inference/v1/generate")
    async def generate_tokens(request: Request, body: TokenGenerateBody) -> Response:
        """Continue a prompt of token ids; without `max_tokens` to the end of the context."""
        async with resolved(request.receive, driver, body.model):
            common = body.common()
            with in_words_of(SAMPLING_WORDS), in_the_clients_field(common.constraint()):
                return await TokenRequest(driver.front, body, common).respond(request, driver)

    return routes


class TokenRequest(OpenAIRequest):
    """One prompt, `n` choices."""

    id_prefix, kind, chunk_kind = "gen", "whole", "chunk"
    prompt_in_head = True

    def __init__(self, front: RequestFront, body: TokenGenerateBody, common: TokenSampling):
        wanted = common.logprobs
        top = None if wanted is None or wanted is False else check_top_logprobs(front, int(wanted), "logprobs")
        (adapters,) = adapters_of(front.registry, common, 1)
        job = Job(
            prompt=body.token_ids,
            ids_param="token_ids",
            sampling=common.sampling({}, common.max_tokens),
            adapters=adapters,
            return_logprob=top is not None,
            top_logprobs_num=top or 0,
            return_ranks=top is not None,
            salt=common.salts(1)[0],
            **common_fields(front, common),
        )
        super().__init__(common, [job], front.config.model_name)
        self._id = body.request_id or uuid.uuid4().hex
        check_rid(self._id, "request_id")  # every chunk repeats it

    def whole(self, sample: Sample) -> Choice:
        unsaid = {"routed_experts": None, "sampling_mask": None}
        return self._choice(sample, sample.stream) | unsaid | {"weight_versions": weight_version_spans(sample)}

    def chunks(self, sample: Sample, delta: Delta, *, first: bool) -> Iterator[Choice]:  # noqa: ARG002 - the contract's
        if delta.token_ids or delta.finished is not None:
            ends = {"weight_versions": weight_version_spans(sample)} if delta.finished is not None else {}
            yield self._choice(sample, delta) | ends

    def _choice(self, sample: Sample, part: TextStream | Delta) -> Choice:
        return {
            "index": sample.index,
            "finish_reason": part.finished.openai() if part.finished else None,
            "stop_reason": _stop_reason(part.finished, sample),
            "token_ids": part.token_ids,
            "logprobs": {"content": _contents(part, sample.job.top_logprobs_num)}
            if sample.job.return_logprob
            else None,
        }

    def _head(self, generation: AsyncGeneration, kind: str) -> dict[str, Any]:
        if kind == self.chunk_kind:
            return {"request_id": self._id, "output_mode": "tokens"}
        return {
            "request_id": self._id,
            "model": self._model,
            "created": int(generation.created),
            "output_mode": "tokens",
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "metrics": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "mm_placeholders": None,
        }


def _stop_reason(finished: FinishReason | None, sample: Sample) -> int | str | None:
    """The stop string or stop token that ended the answer; None at EOS, which is none of them."""
    if finished is None or finished.type != "stop":
        return None
    asked = isinstance(finished.matched, str) or finished.matched in (sample.job.sampling.stop_token_ids or ())
    return finished.matched if asked else None


def _contents(part: TextStream | Delta, top: int) -> list[dict[str, Any]]:
    """One entry for each token, with `top` of the likeliest ones."""
    return [_content(token, logprobs, top) for token, logprobs in zip(part.token_ids, part.logprobs, strict=True)]


def _content(token: int, logprobs: Logprobs, top: int) -> dict[str, Any]:
    """`top_logprobs`: the token itself first, then the likeliest ones that are not it, best first."""
    own = _candidate(token, logprobs.logprob, logprobs.rank)
    others = [
        _candidate(other, logprob, rank)
        for rank, (logprob, other) in enumerate(logprobs.top[:top], 1)
        if other != token
    ]
    return own | {"top_logprobs": [own, *others]}


def _candidate(token: int, logprob: float | None, rank: int | None) -> dict[str, Any]:
    finite = LOWEST if logprob is None else max(logprob, LOWEST)
    return {"token": f"token_id:{token}", "token_id": token, "logprob": finite, "rank": rank}
