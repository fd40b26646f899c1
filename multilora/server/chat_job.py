"""What a conversation asks of the engine, and its answers as typed events, whatever the dialect it came in.

`ChatBody` is the common form: the chat route reads it from HTTP, `server/responses/` and `server/anthropic/`
translate their bodies into it. Knows nothing of how an answer is written on the wire.
"""

from collections.abc import Callable, Sequence
from typing import Any

from multilora.errors import BadRequest
from multilora.front.adapter_spec import AdapterSpec
from multilora.front.generation import Job, Sample
from multilora.front.prompt import ChatPrompt
from multilora.front.request_front import RequestFront
from multilora.front.stream import Delta, TextStream
from multilora.front.tools.answer import AnswerReader
from multilora.front.tools.base import Event, ParsedAnswer, collect
from multilora.front.tools.request import ToolRequest
from multilora.server.openai import adapters_of, check_top_logprobs, common_fields
from multilora.server.openai_bodies import ChatBody, ChatMessage, Conversation

PROMPT_END_TOKENS = 32
"""Tokens of the prompt that are read again to see whether it leaves thoughts open."""


class ChatJob:
    """The job of one conversation, and the readers of its answers.

    param: the client's field that the conversation came in, for errors about the prompt as a whole.
    Raises BadRequest, UnknownModel and UnknownAdapter when made.
    """

    def __init__(
        self, front: RequestFront, body: ChatBody, sampling_defaults: dict[str, Any], param: str = "messages"
    ):
        if body.top_logprobs and not body.logprobs:
            raise BadRequest("top_logprobs: only together with logprobs", param="top_logprobs")
        adapters = adapters_of(front.registry, body, 1)[0]
        self._tools = _tools(front, body, adapters)
        self._readers: dict[int, AnswerReader] = {}  # by the sample's index
        self.job = Job(
            prompt=chat_prompt(
                body, body.messages, self._tools.offered, special=bool(body.add_special_tokens), param=param
            ),
            sampling=self._tools.constrain(body.sampling(sampling_defaults, _limit(body))),
            adapters=adapters,
            kept_tokens=self._tools.markers,
            return_logprob=bool(body.logprobs),
            top_logprobs_num=check_top_logprobs(front, body.top_logprobs or 0, "top_logprobs"),
            salt=body.salts(1)[0],
            **common_fields(front, body),
        )

    @property
    def thinks(self) -> bool:
        """Whether thoughts are told apart from the answer's content."""
        return self._tools.reasoning is not None

    @property
    def has_parsers(self) -> bool:
        """Whether anything in an answer's text may be more than content."""
        return self._tools.has_parsers

    def answer(self, sample: Sample) -> ParsedAnswer:
        """All of a finished sample."""
        reader = self._reader(sample)
        return collect([*reader.push(sample.stream.text), *reader.finish()])

    def events(self, sample: Sample, delta: Delta) -> list[Event]:
        """What `delta`, the next of the sample, adds to its answer."""
        reader = self._readers.get(sample.index)
        if reader is None:
            reader = self._readers[sample.index] = self._reader(sample)
        events = reader.push(delta.text)
        return events if delta.finished is None else events + reader.finish()

    def _reader(self, sample: Sample) -> AnswerReader:
        def prompt_end() -> str:
            ids = sample.prompt_ids[-PROMPT_END_TOKENS:]
            return sample.vocabulary.reader("reasoning").decode(ids, skip_special_tokens=False)

        return self._tools.reader(prompt_end)


def logprob_entries(
    sample: Sample, part: TextStream | Delta, token_name: Callable[[int, str], str] = lambda _, text: text
) -> list[dict[str, Any]]:
    """The tokens of `part`, all of an answer or what is new of it, with their logprobs in OpenAI's form for chats.

    token_name: of a token's id and text, what stands for it. Raises BadRequest where there is no tokenizer.
    """
    tokenizer = sample.vocabulary.reader("logprobs", "logprobs")

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.token_text(token)
        return {"token": token_name(token, text), "logprob": logprob, "bytes": list(text.encode())}

    return [
        entry(token, one.logprob) | {"top_logprobs": [entry(t, lp) for lp, t in one.top]}
        for token, one in zip(part.token_ids, part.logprobs, strict=False)
    ]


def chat_prompt(
    body: Conversation,
    messages: Sequence[ChatMessage],
    tools: list[dict[str, Any]] | None,
    *,
    special: bool = False,
    param: str = "messages",
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
    if taken := (options.keys() | {"messages", "self"}) & own.keys():
        raise BadRequest(f"{min(taken)!r} cannot be given to the chat template", param="chat_template_kwargs")
    return ChatPrompt([message.model_dump(exclude_unset=True) for message in messages], options | own, param)


def _limit(body: ChatBody) -> int | None:
    """`max_completion_tokens` is the newer name of `max_tokens`."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise BadRequest("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
    return old if new is None else new


def _tools(front: RequestFront, body: ChatBody, adapters: AdapterSpec) -> ToolRequest:
    tokenizer = front.vocabularies.of(adapters).tokenizer
    return ToolRequest.parse(
        body.tools,
        body.tool_choice,
        parallel=body.parallel_tool_calls is not False,
        chat_template=tokenizer.chat_template if tokenizer else "",
        tool_call_parser=front.config.tool_call_parser,
        reasoning_parser=None if body.separate_reasoning is False else front.config.reasoning_parser,
    )
