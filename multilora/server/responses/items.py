"""Input items of the Responses API as chat messages.

Items of an assistant that follow each other (thoughts, a message, calls) are one chat message, as the chat template
wants them. Knows nothing of bodies or of stored responses.
"""

from typing import Any

from multilora.front.tools import json_text
from multilora.server.dialects import a_list, a_string, an_object, refused, text_part

ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Types of content parts that are served, and the field in which each has its text."""


def input_items(given: str | list[Any]) -> list[Any]:
    """The `input` of a body as a list of items."""
    return [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given


class ItemMessages:
    """The chat messages that the items added so far make."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._call_ids: set[str] = set()

    def add(self, item: Any, path: str) -> None:
        """Take the next item. path: how errors name it. Raises BadRequest naming the field."""
        item = an_object(item, path)
        match item.get("type", "message"):
            case "message":
                self._message(item, path)
            case "function_call":
                self._call(item, path)
            case "function_call_output":
                self._result(item, path)
            case "reasoning":
                self._reasoning(item, path)
            case other:
                raise refused(f"{path}.type", f"{other!r:.80} is not served")

    def _message(self, item: dict[str, Any], path: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise refused(f"{path}.role", f"{role!r:.80} must be one of {', '.join(ROLES)}")
        content = _content(item.get("content"), f"{path}.content")
        if role == "assistant":
            self._assistant("content", "tool_calls")["content"] = content
        else:
            self.messages.append({"role": role, "content": content})

    def _call(self, item: dict[str, Any], path: str) -> None:
        call_id, name = a_string(item, "call_id", path), a_string(item, "name", path)
        try:
            arguments = json_text.load_object(a_string(item, "arguments", path) or "{}")
        except ValueError as e:
            raise refused(f"{path}.arguments", f"must hold a JSON object: {e}") from None
        self._call_ids.add(call_id)
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._assistant().setdefault("tool_calls", []).append(call)

    def _result(self, item: dict[str, Any], path: str) -> None:
        call_id = a_string(item, "call_id", path)
        if call_id not in self._call_ids:
            raise refused(f"{path}.call_id", f"no function_call before it has the id {call_id!r:.80}")
        content = _content(item.get("output"), f"{path}.output")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def _reasoning(self, item: dict[str, Any], path: str) -> None:
        """Thoughts without readable content, encrypted elsewhere, say nothing to the model."""
        path = f"{path}.content"
        parts = [an_object(part, path) for part in a_list(item.get("content") or [], path)]
        thoughts = "\n".join(a_string(part, "text", path) for part in parts)
        if thoughts:
            self._assistant("reasoning_content", "content", "tool_calls")["reasoning_content"] = thoughts

    def _assistant(self, *taken: str) -> dict[str, Any]:
        """The assistant's message that the next item belongs to: the last one, if it has none of the fields `taken`
        and is an assistant's, else a new one."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or any(field in last for field in taken):
            last = {"role": "assistant"}
            self.messages.append(last)
        return last


def _content(content: Any, path: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = []
    for i, given in enumerate(a_list(content, path)):
        part = an_object(given, f"{path}[{i}]")
        field = _TEXTS.get(str(part.get("type")))
        if field is None:
            raise refused(f"{path}[{i}].type", f"{part.get('type')!r:.80}: only text is served")
        parts.append(text_part(a_string(part, field, f"{path}[{i}]")))
    return parts
