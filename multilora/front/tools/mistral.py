"""Mistral: `[TOOL_CALLS][{"name": "f", "arguments": {…}}, …]`, and since tokenizer v11 `[TOOL_CALLS]f[ARGS]{…}`.

In the newer form the name may be followed by `[CALL_ID]` and an id, `[ARGS]` may be missing, and each call has a
`[TOOL_CALLS]` of its own.
"""

from collections.abc import Sequence

from multilora.front.tools.base import NewId, mistral_call_id
from multilora.front.tools.definitions import Tool
from multilora.front.tools.json_calls import JsonCalls
from multilora.front.tools.json_object import JsonObject

_ARGS = "[ARGS]"
_CALL_ID = "[CALL_ID]"


class MistralCalls(JsonCalls):
    opening = ("[TOOL_CALLS]",)
    lists = True

    def __init__(self, tools: Sequence[Tool], new_id: NewId = mistral_call_id):
        super().__init__(tools, new_id)
        self._name = ""
        self._id = ""
        self._object = JsonObject()

    def _opened(self, marker: str) -> None:
        super()._opened(marker)
        self._name = self._id = ""
        self._state = self._after_marker

    def _after_marker(self, ch: str) -> bool:
        if ch.isspace():
            return self._take(ch)
        if not _of_a_name(ch):
            self._state = self._before_call
            return self._before_call(ch)
        self._state = self._in_name
        return self._in_name(ch)

    def _in_name(self, ch: str) -> bool:
        if _of_a_name(ch):
            self._name += ch
            return self._take(ch)
        self._state = self._before_arguments
        return self._before_arguments(ch)

    def _before_arguments(self, ch: str) -> bool:
        if ch == "{" and not self._expected:
            self._object = JsonObject()
            self._start(self._name, self._id or None)
            self._state = self._in_arguments
            return self._in_arguments(ch)
        read = self._expect(ch, _ARGS, _CALL_ID)
        if read is None:
            return self._fail()
        if read == _CALL_ID:
            self._state = self._in_id
        return True

    def _in_id(self, ch: str) -> bool:
        if ch == "[":
            self._state = self._before_arguments
            return self._before_arguments(ch)
        self._id += ch
        return self._take(ch) if _of_a_name(ch) else self._fail()

    def _in_string(self) -> bool:
        return (self._state == self._in_arguments and self._object.in_string) or super()._in_string()

    def _in_arguments(self, ch: str) -> bool:
        text = self._object.feed(ch)
        if text is None:
            return self._fail()
        self._take(ch)
        self._arguments(text)
        if self._object.done:
            self._end()
            self._state = self._after_call_object
        return True


def _of_a_name(ch: str) -> bool:
    return ch.isalnum() or ch in "_-."
