"""`POST /v1/chat/completions`: messages through the model's chat template, answers as assistant messages."""

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import BadRequest
from multilora.front.adapter_spec import AdapterSpec
from multilora.front.front import Front
from multilora.front.generation import Job, Sample
from multilora.front.prompt import ChatPrompt
from multilora.front.stream import Delta, TextStream
from multilora.front.tools.answer import AnswerReader
from multilora.front.tools.messages import prepare_messages
from multilora.front.tools.request import ToolRequest
from multilora.server.chat_answer import MessageStream, finish_reason, whole_message
from multilora.server.errors import StrictRoute
from multilora.server.openai import Choice, OpenAIRequest, adapters_of, check_top_logprobs, common_fields
from multilora.server.openai_bodies import ChatBody, ChatMessage, Conversation
from multilora.server.resolving import resolved

PROMPT_END_TOKENS = 32
"""Tokens of the prompt that are read again to see whether it leaves thoughts open."""


def router(driver: AsyncDriver, sampling_defaults: dict[str, Any]) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            return await ChatRequest(driver.front, body, sampling_defaults).respond(request, driver)

    return routes


class ChatRequest(OpenAIRequest):
    """One conversation; a sample is a choice."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    prompt_in_head = True

    def __init__(self, front: Front, body: ChatBody, sampling_defaults: dict[str, Any]):
        if body.top_logprobs and not body.logprobs:
            raise BadRequest("top_logprobs: only together with logprobs", param="top_logprobs")
        adapters = adapters_of(front.registry, body, 1)[0]
        self._tools = _tools(front, body, adapters)
        self._streams: dict[int, MessageStream] = {}  # by the sample's index
        job = Job(
            prompt=chat_prompt(body, body.messages, self._tools.offered, special=bool(body.add_special_tokens)),
            sampling=self._tools.constrain(body.sampling(sampling_defaults, _limit(body))),
            adapters=adapters,
            kept_tokens=self._tools.markers,
            return_logprob=bool(body.logprobs),
            top_logprobs_num=check_top_logprobs(body.top_logprobs or 0, "top_logprobs"),
            salt=body.salts(1)[0],
            **common_fields(body),
        )
        super().__init__(body, [job], front.config.model_name)
        self._last_message = body.messages[-1] if body.echo and body.messages[-1].role == "assistant" else None

    def whole(self, sample: Sample) -> Choice:
        stream = sample.stream
        message = whole_message(self._reader(sample), stream.text, thinks=self._tools.reasoning is not None)
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
            self._streams[sample.index] = MessageStream(self._reader(sample))
            yield _chunk(sample.index, {"role": "assistant", "content": self._echo()})
        stream = self._streams[sample.index]
        deltas = stream.push(delta.text, delta.finished)
        logprobs, token_ids = self._logprobs(sample, delta), self._token_ids(delta)
        if not deltas and ((logprobs and logprobs["content"]) or token_ids.get("token_ids")):
            deltas = [{"content": ""}]
        for one in deltas:
            yield _chunk(sample.index, one, logprobs) | token_ids
            logprobs, token_ids = None, {}  # the first one has them
        if delta.finished:
            yield _chunk(sample.index, {}, finish_reason=finish_reason(delta.finished, called=stream.called))

    def _echo(self) -> str:
        """What `echo` puts before the answer: the last message, if it is the assistant's as well."""
        if self._last_message is None:
            return ""
        [message] = prepare_messages([self._last_message.model_dump(exclude_unset=True)])
        return str(message["content"])

    def _reader(self, sample: Sample) -> AnswerReader:
        """The reader of the sample's answer."""

        def prompt_end() -> str:
            ids = sample.prompt_ids[-PROMPT_END_TOKENS:]
            return sample.vocabulary.reader("reasoning").decode(ids, skip_special_tokens=False)

        return self._tools.reader(prompt_end)

    def _logprobs(self, sample: Sample, part: TextStream | Delta) -> dict[str, Any] | None:
        """`part`: all of the answer, or what is new of it."""
        if not sample.job.return_logprob:
            return None
        tokenizer = sample.vocabulary.reader("logprobs", "logprobs")

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = tokenizer.token_text(token)
            return {"token": self._token_name(token, text), "logprob": logprob, "bytes": list(text.encode())}

        content = [
            entry(token, one.logprob) | {"top_logprobs": [entry(t, lp) for lp, t in one.top]}
            for token, one in zip(part.token_ids, part.logprobs, strict=False)
        ]
        return {"content": content, "refusal": None}


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> Choice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_prompt(
    body: Conversation,
    messages: Sequence[ChatMessage],
    tools: list[dict[str, Any]] | None,
    *,
    special: bool = False,
) -> ChatPrompt:
    """The messages and options for the chat template, which is shown `tools`. special: the tokenizer adds its special
    tokens to what the template writes. Raises BadRequest."""
    options: dict[str, Any] = {
        "tools": tools,
        "add_generation_prompt": body.add_generation_prompt is not False and not body.continue_final_message,
        "continue_final_message": bool(body.continue_final_message),
        "add_special_tokens": special,
    }
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
    own = body.chat_template_kwargs or {}
    if taken := options.keys() & own.keys():
        raise BadRequest(f"{min(taken)!r} cannot be given to the chat template", param="chat_template_kwargs")
    return ChatPrompt([message.model_dump(exclude_unset=True) for message in messages], options | own)


def _limit(body: ChatBody) -> int | None:
    """`max_completion_tokens` is the newer name of `max_tokens`."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise BadRequest("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
    return old if new is None else new


def _tools(front: Front, body: ChatBody, adapters: AdapterSpec) -> ToolRequest:
    tokenizer = front.vocabularies.of(adapters).tokenizer
    return ToolRequest.parse(
        body.tools,
        body.tool_choice,
        parallel=body.parallel_tool_calls is not False,
        chat_template=tokenizer.chat_template if tokenizer else "",
        tool_call_parser=front.config.tool_call_parser,
        reasoning_parser=None if body.separate_reasoning is False else front.config.reasoning_parser,
    )
