"""`POST /v1/chat/completions`: messages through the model's chat template, answers as assistant messages."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import BadRequest
from multilora.front.front import Front
from multilora.front.generation import Job, Sample
from multilora.front.prompt import ChatPrompt
from multilora.front.stream import Delta, TextStream
from multilora.front.tokenizer import Tokenizer
from multilora.server.errors import StrictRoute
from multilora.server.openai import Choice, OpenAIRequest, adapters_of, check_top_logprobs
from multilora.server.openai_bodies import ChatBody


def router(driver: AsyncDriver, sampling_defaults: dict[str, Any]) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        return await ChatRequest(driver.front, body, sampling_defaults).respond(request, driver)

    return routes


class ChatRequest(OpenAIRequest):
    """One conversation; a sample is a choice."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, front: Front, body: ChatBody, sampling_defaults: dict[str, Any]):
        if body.top_logprobs is not None and not body.logprobs:
            raise BadRequest("top_logprobs: only together with logprobs", param="top_logprobs")
        job = Job(
            prompt=_prompt(body),
            sampling=body.sampling(sampling_defaults, _limit(body)),
            adapters=adapters_of(front.registry, body, 1)[0],
            return_logprob=bool(body.logprobs),
            top_logprobs_num=check_top_logprobs(body.top_logprobs or 0, "top_logprobs"),
        )
        super().__init__(body, [job])

    def whole(self, sample: Sample) -> Choice:
        stream = sample.stream
        return {
            "index": sample.index,
            "message": {"role": "assistant", "content": stream.text, "refusal": None},
            "logprobs": _logprobs(sample, stream),
            "finish_reason": stream.finished.openai() if stream.finished else None,
        }

    def chunks(self, sample: Sample, delta: Delta, *, first: bool) -> Iterator[Choice]:
        if first:
            yield _chunk(sample.index, {"role": "assistant", "content": ""})
        logprobs = _logprobs(sample, delta)
        if delta.text or (logprobs and logprobs["content"]):
            yield _chunk(sample.index, {"content": delta.text}, logprobs)
        if delta.finished:
            yield _chunk(sample.index, {}, finish_reason=delta.finished.openai())


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> Choice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(sample: Sample, part: TextStream | Delta) -> dict[str, Any] | None:
    """`part`: all of the answer, or what is new of it."""
    if not sample.job.return_logprob:
        return None
    tokenizer = sample.vocabulary.reader("logprobs", "logprobs")
    content = [
        _token(tokenizer, token, one.logprob) | {"top_logprobs": [_token(tokenizer, t, lp) for lp, t in one.top]}
        for token, one in zip(part.token_ids, part.logprobs, strict=False)
    ]
    return {"content": content, "refusal": None}


def _token(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    text = tokenizer.token_text(token)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _prompt(body: ChatBody) -> ChatPrompt:
    options: dict[str, Any] = {
        "tools": _tools(body),
        "add_generation_prompt": body.add_generation_prompt is not False and not body.continue_final_message,
        "continue_final_message": bool(body.continue_final_message),
    }
    own = body.chat_template_kwargs or {}
    if taken := options.keys() & own.keys():
        raise BadRequest(f"{min(taken)!r} cannot be given to the chat template", param="chat_template_kwargs")
    return ChatPrompt([message.plain() for message in body.messages], options | own)


def _limit(body: ChatBody) -> int | None:
    """`max_completion_tokens` is the newer name of `max_tokens`."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise BadRequest("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
    return old if new is None else new


def _tools(body: ChatBody) -> list[dict[str, Any]] | None:
    """Tools go into the template; an answer that calls one comes back as text. Forcing a call is not served."""
    if body.tool_choice not in (None, "auto", "none"):
        raise BadRequest("tool_choice: only 'auto' and 'none' are served", param="tool_choice")
    return None if body.tool_choice == "none" else body.tools or None
