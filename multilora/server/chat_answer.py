"""The events of an answer in the words of `/v1/chat/completions`: messages, and the deltas of a stream.

Knows the wire's form of content, thoughts and tool calls; nothing of requests or logprobs. Called by `chat.py`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from multilora.front.stream import FinishReason
from multilora.front.tools.base import (
    Arguments,
    Call,
    CallAbandoned,
    CallEnded,
    CallStarted,
    Content,
    Event,
    ParsedAnswer,
    Reasoning,
)


def whole_message(answer: ParsedAnswer, *, thinks: bool) -> dict[str, Any]:
    """The assistant's message that a finished answer makes. thinks: a reasoning parser is in use."""
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
    """One answer of a stream, as its events come."""

    def __init__(self) -> None:
        self.called = False
        """A complete call has been sent."""

    def push(self, events: Iterable[Event], finished: FinishReason | None) -> list[dict[str, Any]]:
        """The deltas that the next events of the answer make."""
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
