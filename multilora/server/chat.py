"""`POST /v1/chat/completions`: messages through the model's chat template, answers as assistant messages."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.request_driver import RequestDriver
from multilora.front.generation import Sample
from multilora.front.request_front import RequestFront
from multilora.front.stream import Delta, TextStream
from multilora.front.tools.messages import prepare_messages
from multilora.server.chat_answer import MessageStream, finish_reason, whole_message
from multilora.server.chat_job import ChatJob, logprob_entries
from multilora.server.constraints import in_the_clients_field
from multilora.server.dialects import in_words_of
from multilora.server.openai import Choice, OpenAIRequest
from multilora.server.openai_bodies import ChatBody
from multilora.server.resolving import resolved
from multilora.server.strict_route import StrictRoute


def router(driver: RequestDriver, sampling_defaults: dict[str, Any]) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            with in_words_of(body.words), in_the_clients_field(body.constraint()):
                return await ChatRequest(driver.front, body, sampling_defaults).respond(request, driver)

    return routes


class ChatRequest(OpenAIRequest):
    """One conversation; a sample is a choice."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    prompt_in_head = True

    def __init__(self, front: RequestFront, body: ChatBody, sampling_defaults: dict[str, Any]):
        self._chat = ChatJob(front, body, sampling_defaults)
        self._streams: dict[int, MessageStream] = {}  # by the sample's index
        super().__init__(body, [self._chat.job], front.config.model_name)
        self._last_message = body.messages[-1] if body.echo and body.messages[-1].role == "assistant" else None

    def whole(self, sample: Sample) -> Choice:
        stream = sample.stream
        message = whole_message(self._chat.answer(sample), thinks=self._chat.thinks)
        if echo := self._echo():
            message["content"] = echo + (message["content"] or "")
        return {
            "index": sample.index,
            "message": message,
            "logprobs": self._logprobs(sample, stream),
            "finish_reason": finish_reason(stream.finished, called="tool_calls" in message),
        } | self._token_ids(stream)

    def chunks(self, sample: Sample, delta: Delta, *, first: bool) -> Iterator[Choice]:
        if first:
            self._streams[sample.index] = MessageStream()
            yield _chunk(sample.index, {"role": "assistant", "content": self._echo()})
        stream = self._streams[sample.index]
        deltas = stream.push(self._chat.events(sample, delta), delta.finished)
        logprobs, token_ids = self._logprobs(sample, delta), self._token_ids(delta)
        if not deltas and ((logprobs and logprobs["content"]) or token_ids.get("token_ids")):
            deltas = [{"content": ""}]
        for one in deltas:
            yield _chunk(sample.index, one, logprobs) | token_ids
            logprobs, token_ids = None, {}  # the first one has them
        if delta.finished:
            yield _chunk(sample.index, {}, finish_reason=finish_reason(delta.finished, called=stream.called))

    def text_choice(self, sample: Sample, text: str) -> Choice | None:
        if sample.job.return_logprob or self._body.return_token_ids or self._chat.has_parsers:
            return None
        return _chunk(sample.index, {"content": text})

    def _echo(self) -> str:
        """What `echo` puts before the answer: the last message, if it is the assistant's as well."""
        if self._last_message is None:
            return ""
        [message] = prepare_messages([self._last_message.model_dump(exclude_unset=True)])
        return str(message["content"])

    def _logprobs(self, sample: Sample, part: TextStream | Delta) -> dict[str, Any] | None:
        """`part`: all of the answer, or what is new of it."""
        if not sample.job.return_logprob:
            return None
        content = logprob_entries(sample, part, self._token_name)
        return {"content": content, "refusal": None}


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> Choice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
