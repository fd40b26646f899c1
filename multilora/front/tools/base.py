"""The contract of a tool-call parser: an answer's text in, events out.

A parser reads one answer in pieces of any size; where the pieces are cut never changes what the events add up to.
Text that is no call comes back as it is, with one exception: white space right beside a call belongs to the call's
markup and is dropped. Owns the events and the ids of calls; knows no format. Implemented by the format modules.
"""

import secrets
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from multilora.front.tools.definitions import Tool

NewId = Callable[[], str]
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thoughts before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call of function `name` begins; `index` counts the calls of one answer from 0 and is never used twice."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next piece of a started call's arguments; all pieces joined are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call is complete: its arguments are valid JSON."""

    index: int


@dataclass(frozen=True, slots=True)
class CallAbandoned:
    """A started call turned out malformed, or the answer ended inside it: it is no call.

    text: the call exactly as the model wrote it, markup included, which is content now.
    """

    index: int
    text: str


Event = Content | Reasoning | CallStarted | Arguments | CallEnded | CallAbandoned


class ToolCallParser(Protocol):
    """Reads one answer. `finish` is called once, after the last `push`. Neither ever raises because of the text."""

    def push(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


ParserFactory = Callable[[Sequence[Tool], NewId], ToolCallParser]


def openai_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def mistral_call_id() -> str:
    """Nine letters and digits: Mistral's chat templates refuse every other id when it comes back in a message."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


@dataclass(slots=True)
class Call:
    """A complete call. arguments: the text of a JSON object."""

    id: str
    name: str
    arguments: str = ""


Part = Content | Reasoning | Call
"""What an answer is made of, once nothing can be taken back: pieces of text and of thoughts, whole calls."""


class SettledParts:
    """The events of one answer as parts: a call is held back until it is complete, and is content if abandoned."""

    def __init__(self) -> None:
        self._started: dict[int, Call] = {}

    def push(self, events: Iterable[Event]) -> list[Part]:
        """The parts that `events`, the next ones of the answer, settle."""
        parts: list[Part] = []
        for event in events:
            match event:
                case Content() | Reasoning():
                    parts.append(event)
                case CallStarted(index, call_id, name):
                    self._started[index] = Call(call_id, name)
                case Arguments(index, text):
                    self._started[index].arguments += text
                case CallEnded(index):
                    parts.append(self._started.pop(index))
                case CallAbandoned(index, text):
                    del self._started[index]
                    parts.append(Content(text))
        return parts


@dataclass(slots=True)
class ParsedAnswer:
    """What the events of a whole answer add up to."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


def collect(events: Iterable[Event]) -> ParsedAnswer:
    """The answer that all events of one parser make; abandoned calls are part of its content."""
    answer = ParsedAnswer()
    for part in SettledParts().push(events):
        match part:
            case Content(text):
                answer.content += text
            case Reasoning(text):
                answer.reasoning += text
            case Call():
                answer.calls.append(part)
    return answer
