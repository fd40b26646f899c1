"""`POST /v1/chat/completions`: messages through the model's chat template, answers as assistant messages."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.engine.messages import TopLogprobs
from multilora.errors import BadRequest
from multilora.server.errors import StrictRoute
from multilora.server.generation import Flight, Front, Job, Sequence
from multilora.server.openai import Reply, adapters_of, check_top_logprobs
from multilora.server.openai_bodies import ChatBody


def router(front: Front) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        choices = Choices(front, body)
        reply = Reply(body, "chatcmpl", "chat.completion", "chat.completion.chunk")
        return await reply.send(request, front, choices.jobs, choices.whole, choices.chunks)

    return routes


class Choices:
    """The jobs of one request, and its sequences as choices."""

    def __init__(self, front: Front, body: ChatBody):
        self._with_logprobs = bool(body.logprobs)
        if body.top_logprobs is not None and not body.logprobs:
            raise BadRequest("top_logprobs: only together with logprobs", param="top_logprobs")
        top = check_top_logprobs(body.top_logprobs or 0, "top_logprobs")
        adapters = adapters_of(front.registry, body, 1)[0]
        sampling = body.sampling(front.sampling_defaults, _limit(body))
        vocabulary = front.vocabularies.of(adapters)
        self._tokenizer = vocabulary.writer("chat", "messages")
        prompt = self._tokenizer.encode_chat(
            [message.plain() for message in body.messages],
            tools=_tools(body),
            add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
            continue_final_message=bool(body.continue_final_message),
            **(body.chat_template_kwargs or {}),
        )
        self.jobs = [
            Job(
                prompt_ids=prompt,
                sampling=sampling,
                adapters=adapters,
                vocabulary=vocabulary,
                sample=j,
                return_logprob=self._with_logprobs,
                top_logprobs_num=top,
            )
            for j in range(sampling.n)
        ]

    def whole(self, index: int, sequence: Sequence) -> dict[str, Any]:
        stream = sequence.stream
        return {
            "index": index,
            "message": {"role": "assistant", "content": stream.text, "refusal": None},
            "logprobs": self._logprobs(stream.token_ids, stream.logprobs, stream.top_logprobs),
            "finish_reason": stream.finished.openai() if stream.finished else None,
        }

    async def chunks(self, flight: Flight) -> AsyncGenerator[dict[str, Any], None]:
        begun: set[int] = set()
        async for index, delta in flight.events():
            if index not in begun:
                begun.add(index)
                yield _chunk(index, {"role": "assistant", "content": ""})
            logprobs = self._logprobs(delta.token_ids, delta.logprobs, delta.top_logprobs)
            if delta.text or (logprobs and logprobs["content"]):
                yield _chunk(index, {"content": delta.text}, logprobs)
            if delta.finished:
                yield _chunk(index, {}, finish_reason=delta.finished.openai())

    def _logprobs(
        self, tokens: list[int], logprobs: list[float | None] | None, top: list[TopLogprobs] | None
    ) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        tops = top or [[] for _ in tokens]
        content = [
            self._token(token, logprob) | {"top_logprobs": [self._token(t, lp) for lp, t in best]}
            for token, logprob, best in zip(tokens, logprobs or [], tops, strict=False)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


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
