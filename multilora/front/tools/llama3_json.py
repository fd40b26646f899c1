"""Llama 3.1 to 3.3: `{"name": "f", "parameters": {…}}`, several separated by ";", optionally after `<|python_tag|>`.

Without the tag, an object counts only at the very beginning of the answer, and only when it holds nothing but a
call of an offered function: an answer that is some other JSON is content, and streams from its first other member on.
"""

from collections.abc import Sequence

from multilora.front.tools.base import NewId, openai_call_id
from multilora.front.tools.definitions import Tool
from multilora.front.tools.json_calls import JsonCalls


class Llama3JsonCalls(JsonCalls):
    opening = ("<|python_tag|>",)
    separators = ";,"

    def __init__(self, tools: Sequence[Tool], new_id: NewId = openai_call_id):
        super().__init__(tools, new_id)
        self._state = self._beginning

    def _beginning(self, ch: str) -> bool:
        if ch == "{":
            self._known = self._names
            return self._before_call(ch)
        return self._take(ch) if ch.isspace() else self._leave()
