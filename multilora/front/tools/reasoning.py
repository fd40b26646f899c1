"""Reasoning parsers: the model's thoughts between `<think>` and `</think>`, told apart from its answer.

Same rules as the tool-call parsers: pieces of any size, and nothing but a possible tag and the white space beside it
is held back. White space between the thoughts, their tags and the answer belongs to the tags. The thoughts end at the
first closing tag; without one they are all there is, because the answer was cut before it began.
"""

from collections.abc import Callable
from typing import Protocol

from multilora.front.tools.base import Content, Event, Reasoning
from multilora.front.tools.scanner import MAX_HELD_SPACE, MarkerSearch

_THINK = "<think>"
_END_THINK = "</think>"
_TOOL_CALL = "\n<tool_call>"  # at the beginning of a line: thoughts may mention the tag
_LINE = "\n"  # put before the thoughts, which begin a line too; dropped with the white space there


class ReasoningParser(Protocol):
    """Reads one answer into Reasoning and Content events. Never raises because of the text."""

    def push(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class ThinkTags:
    """inside: the answer begins within the thoughts, whether or not it repeats the opening tag.

    ends: what ends the thoughts; of these, only the closing tag is markup, all else belongs to the answer.
    """

    def __init__(self, *, inside: bool, ends: tuple[str, ...] = (_END_THINK,)):
        self._ends = MarkerSearch(ends)
        self._inside = inside
        self._read: Callable[[str], list[Event]] = self._beginning
        self._held = ""
        self._thinking = False  # a thought has come

    def push(self, text: str) -> list[Event]:
        """The events that `text`, the next piece of the answer, completes."""
        return self._read(text) if text else []

    def finish(self) -> list[Event]:
        """The events that the end of the answer completes."""
        held, self._held = self._held, ""
        if self._read == self._beginning and not self._inside:
            return _content(held)
        return self._reasoning(held.rstrip())

    def _reasoning(self, text: str) -> list[Event]:
        """White space before the first thought is dropped."""
        text = text if self._thinking else text.lstrip()
        self._thinking = self._thinking or bool(text)
        return [Reasoning(text)] if text else []

    def _beginning(self, text: str) -> list[Event]:
        """White space and perhaps the opening tag."""
        self._held += text
        stripped = self._held.lstrip()
        if len(self._held) - len(stripped) <= MAX_HELD_SPACE:
            if stripped.startswith(_THINK):
                return self._go_on(self._thoughts, _LINE + stripped.removeprefix(_THINK))
            if _THINK.startswith(stripped):
                return []
        if self._inside:
            return self._go_on(self._thoughts, _LINE + self._held)
        return self._go_on(self._answer, self._held)

    def _go_on(self, read: Callable[[str], list[Event]], text: str) -> list[Event]:
        self._read = read
        self._held = ""
        return read(text) if text else []

    def _thoughts(self, text: str) -> list[Event]:
        buffer = self._held + text
        found = self._ends.find(buffer)
        end = found.start() if found else len(buffer) - self._ends.partial(buffer)
        kept = max(len(buffer[:end].rstrip()), end - MAX_HELD_SPACE)
        events = self._reasoning(buffer[:kept])
        if found is None:
            self._held = buffer[kept:]
            return events
        if found.group() == _END_THINK:
            return events + self._go_on(self._before_answer, buffer[found.end() :])
        return events + self._go_on(self._answer, buffer[found.start() :].lstrip())

    def _before_answer(self, text: str) -> list[Event]:
        stripped = text.lstrip()
        return self._go_on(self._answer, stripped) if stripped else []

    def _answer(self, text: str) -> list[Event]:
        return _content(text)


def _content(text: str) -> list[Event]:
    return [Content(text)] if text else []


def _deepseek_r1(prompt: str) -> ThinkTags:
    """Thoughts come first with or without an opening tag, unless the prompt has closed them already."""
    return ThinkTags(inside=opened_by(prompt) is not False)


def _qwen3(prompt: str) -> ThinkTags:
    """Thoughts come if a tag opens them, in the answer or at the prompt's end. A call ends them if no tag does."""
    return ThinkTags(inside=opened_by(prompt) is True, ends=(_END_THINK, _TOOL_CALL))


def opened_by(prompt: str) -> bool | None:
    """Whether the generation prompt at the end of a rendered `prompt` leaves thoughts open; None: it has no tag."""
    tail = prompt.rstrip()
    if tail.endswith(_THINK):
        return True
    return False if tail.endswith(_END_THINK) else None


# prompt: the rendered prompt, or "" if it is not known as text.
REASONING: dict[str, Callable[[str], ReasoningParser]] = {
    "deepseek_r1": _deepseek_r1,
    "deepseek-r1": _deepseek_r1,
    "qwen3-thinking": _deepseek_r1,
    "qwen3": _qwen3,
}
