"""The events of an answer in the words of `/v1/chat/completions`: messages, and the deltas of a stream.

Knows the wire's form of content, thoughts and tool calls; nothing of requests or logprobs. Called by `chat.py`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from multilora.front.stream import FinishReason
from multilora.front.tools.answer import AnswerReader
from multilora.front.tools.base import (
    Arguments,
    Call,
    CallAbandoned,
    CallEnded,
    CallStarted,
    Content,
    Event,
    Reasoning,
    collect,
)


def whole_message(reader: AnswerReader, text: str, *, thinks: bool) -> dict[str, Any]:
    """The assistant's message that the finished answer `text` makes. thinks: a reasoning parser is in use."""
    answer = collect([*reader.push(text), *reader.finish()])
    content = None if answer.calls and not answer.content else answer.content
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if thinks:
        message["reasoning_content"] = answer.reasoning or None
    if answer.calls:
        message["tool_calls"] = [_whole_call(call) for call in answer.calls]
    return message


def finish_reason(finished: FinishReason | None, *, called: bool) -> str | None:
    """called: the answer has a complete call."""
    if finished is None:
        return None
    return "tool_calls" if called and finished.type == "stop" else finished.openai()


class MessageStream:
    """One answer of a stream, read piece by piece."""

    def __init__(self, reader: AnswerReader):
        self.called = False
        """A complete call has been sent."""
        self._reader = reader

    def push(self, text: str, finished: FinishReason | None) -> list[dict[str, Any]]:
        """The deltas that the next piece of the answer makes."""
        events = self._reader.push(text)
        if finished is not None:
            events += self._reader.finish()
        return list(self._deltas(events, cut=finished is not None and finished.type == "length"))

    def _deltas(self, events: Iterable[Event], *, cut: bool) -> Iterator[dict[str, Any]]:
        """cut: the answer ended at a limit. The call that it ended in has been sent up to there, and stays so; any
        other abandoned call is sent again as content, since its arguments are no JSON."""
        for event in events:
            match event:
                case Content(text):
                    yield {"content": text}
                case Reasoning(text):
                    yield {"reasoning_content": text}
                case CallStarted(index, call_id, name):
                    function = {"name": name, "arguments": ""}
                    yield _call_delta({"index": index, "id": call_id, "type": "function", "function": function})
                case Arguments(index, text):
                    yield _call_delta({"index": index, "function": {"arguments": text}})
                case CallEnded():
                    self.called = True
                case CallAbandoned(_, text):
                    if not cut:
                        yield {"content": text}


def _call_delta(call: dict[str, Any]) -> dict[str, Any]:
    return {"tool_calls": [call]}


def _whole_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
