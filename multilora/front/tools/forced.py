"""Answers made under the grammars of `schema.py`: JSON from the first character on, whatever the model's own format.

A grammar leaves only one way to be malformed, an answer cut by a limit, and that is treated as everywhere: a call
without an end is content.
"""

from collections.abc import Sequence

from multilora.front.tools.base import NewId, openai_call_id
from multilora.front.tools.definitions import Tool
from multilora.front.tools.json_calls import JsonCalls
from multilora.front.tools.json_object import JsonObject
from multilora.front.tools.scanner import CallScanner


class RequiredCalls(JsonCalls):
    """`tool_choice: "required"`: a list of `{"name": "f", "parameters": {…}}`."""

    lists = True

    def __init__(self, tools: Sequence[Tool], new_id: NewId = openai_call_id):
        super().__init__(tools, new_id)
        self._state = self._before_call


class NamedCall(CallScanner):
    """A named `tool_choice`: the answer is the arguments of `name`, one JSON object."""

    def __init__(self, name: str, new_id: NewId = openai_call_id):
        super().__init__((), new_id)
        self._name = name
        self._object = JsonObject()
        self._state = self._beginning

    def _beginning(self, ch: str) -> bool:
        if ch.isspace():
            return self._take(ch)
        if ch != "{":
            return self._fail()
        self._start(self._name)
        self._state = self._in_arguments
        return self._in_arguments(ch)

    def _in_string(self) -> bool:
        return self._state == self._in_arguments and self._object.in_string

    def _in_arguments(self, ch: str) -> bool:
        text = self._object.feed(ch)
        if text is None:
            return self._fail()
        self._take(ch)
        self._arguments(text)
        if self._object.done:
            self._end()
            self._close()
        return True
