"""One answer read through both parsers: thoughts first, then calls in what is left."""

from multilora.front.tools.base import (
    Arguments,
    CallAbandoned,
    CallEnded,
    CallStarted,
    Content,
    Event,
    ToolCallParser,
)
from multilora.front.tools.reasoning import ReasoningParser


class AnswerReader:
    """reasoning, tools: the parsers to use; None: text passes as it is.

    parallel: False keeps the first call only (`parallel_tool_calls: false`, where no grammar has seen to it).
    A forced tool choice wants no reasoning parser: its grammar leaves no room for thoughts.
    """

    def __init__(
        self, reasoning: ReasoningParser | None, tools: ToolCallParser | None, *, parallel: bool = True
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._parallel = parallel

    def push(self, text: str) -> list[Event]:
        """The events that `text`, the next piece of the answer, completes."""
        if self._reasoning is None:
            return self._push_tools([Content(text)] if text else [])
        return self._push_tools(self._reasoning.push(text))

    def finish(self) -> list[Event]:
        """The events that the end of the answer completes."""
        events = self._push_tools(self._reasoning.finish()) if self._reasoning else []
        return events + self._kept(self._tools.finish()) if self._tools else events

    def _push_tools(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        out: list[Event] = []
        for event in events:
            out += self._kept(self._tools.push(event.text)) if isinstance(event, Content) else [event]
        return out

    def _kept(self, events: list[Event]) -> list[Event]:
        return events if self._parallel else [event for event in events if not _of_a_later_call(event)]


def _of_a_later_call(event: Event) -> bool:
    return isinstance(event, CallStarted | Arguments | CallEnded | CallAbandoned) and event.index > 0
