"""The state machine that the JSON formats share: markers around one or more call objects.

    <opening marker> {call} {call} <closing marker>         also "[" {call} "," {call} "]" where lists are allowed

Each object is a call of its own: it ends when its last bracket comes, and what follows cannot undo it.
"""

from collections.abc import Sequence
from typing import ClassVar

from multilora.front.tools.base import NewId, openai_call_id
from multilora.front.tools.definitions import Tool
from multilora.front.tools.json_object import CallObject
from multilora.front.tools.scanner import CallScanner


class JsonCalls(CallScanner):
    """A format is the class attributes: what opens and closes a group of calls, and what may stand between two."""

    opening: ClassVar[tuple[str, ...]] = ()
    closing: ClassVar[str] = ""
    separators: ClassVar[str] = ","
    lists: ClassVar[bool] = False

    def __init__(self, tools: Sequence[Tool], new_id: NewId = openai_call_id):
        super().__init__(tools, new_id, markers=self.opening)
        self._known: frozenset[str] | None = None  # the only names that make a call; None: any
        self._in_list = False
        self._may_list = self.lists  # a "[" may come
        self._call = CallObject()

    def _opened(self, marker: str) -> None:  # noqa: ARG002 - part of the contract
        self._known = None
        self._in_list = False
        self._may_list = self.lists
        self._state = self._before_call

    def _before_call(self, ch: str) -> bool:
        if ch == "{":
            self._call = CallObject(self._known)
            self._state = self._in_call
            return self._in_call(ch)
        if ch == "[" and self._may_list:
            self._in_list = True
            self._may_list = False
            return self._take(ch)
        return self._take(ch) if ch.isspace() else self._fail()

    def _in_string(self) -> bool:
        return self._state == self._in_call and self._call.in_string

    def _in_call(self, ch: str) -> bool:
        if not self._call.feed(ch):
            return self._fail()
        self._take(ch)
        if self._call.started:
            if not self._open:
                self._start(self._call.name or "")
            self._arguments(self._call.take())
        if self._call.done:
            self._end()
            self._state = self._after_call_object
        return True

    def _after_call_object(self, ch: str) -> bool:
        """White space, then a further call, the end of the group, or text that belongs to no call."""
        if not self._expected:
            if ch == "{":
                return self._before_call(ch)
            if ch in ("," if self._in_list else self.separators):
                self._may_list = False
                return self._take(ch, self._before_call)
            if ch == "]" and self._in_list:
                self._in_list = False
                self._taken = []
                return True if self.closing else self._close()
            if ch.isspace():
                return self._take(ch)
        read = self._expect(ch, self.closing) if self.closing else None
        if read is None:
            return self._leave()
        return self._close() if read else True
