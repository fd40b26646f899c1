"""Qwen3-Coder's XML: `<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`.

The outer tags may be missing. Values are plain text; the tool's schema says which are numbers, booleans, lists or
objects, and a value that is not what the schema says stays text. A parameter may lack its closing tag if the next
tag begins a line. Arguments are passed on parameter by parameter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from multilora.front.tools import json_text
from multilora.front.tools.base import NewId, openai_call_id
from multilora.front.tools.definitions import Tool
from multilora.front.tools.scanner import CallScanner

_TOOL_CALL = "<tool_call>"
_FUNCTION = "<function="
_PARAMETER = "<parameter="
_END_PARAMETER = "</parameter>"
_END_FUNCTION = "</function>"
_END_TOOL_CALL = "</tool_call>"
_VALUE_ENDS = (_END_PARAMETER, "\n" + _PARAMETER, "\n" + _END_FUNCTION)
_LONGEST_END = max(map(len, _VALUE_ENDS))


class Qwen3CoderCalls(CallScanner):
    def __init__(self, tools: Sequence[Tool], new_id: NewId = openai_call_id):
        super().__init__(tools, new_id, markers=(_TOOL_CALL, _FUNCTION))
        self._schemas = {tool.name: tool.parameters for tool in tools}
        self._name = ""
        self._key = ""
        self._keys: set[str] = set()
        self._value: list[str] = []

    def _opened(self, marker: str) -> None:
        self._name = ""
        self._state = self._in_name if marker == _FUNCTION else self._before_function

    def _before_function(self, ch: str) -> bool:
        read = self._expect(ch, _FUNCTION)
        if read:
            self._state = self._in_name
        return read is not None or self._fail()

    def _in_name(self, ch: str) -> bool:
        if ch != ">":
            self._name += ch
            return self._take(ch) if ch.isprintable() and ch not in "<\"'" else self._fail()
        if not self._name.strip():
            return self._fail()
        self._name = self._name.strip()
        self._keys = set()
        self._start(self._name)
        return self._take(ch, self._between)

    def _between(self, ch: str) -> bool:
        read = self._expect(ch, _PARAMETER, _END_FUNCTION)
        if read is None:
            return self._fail()
        if read:
            self._tag(read)
        return True

    def _tag(self, tag: str) -> None:
        """A tag has been read that begins a parameter or ends the call."""
        if tag == _PARAMETER:
            self._key = ""
            self._state = self._in_key
            return
        self._arguments("}" if self._keys else "{}")
        self._end()
        self._state = self._after_function

    def _in_key(self, ch: str) -> bool:
        if ch != ">":
            self._key += ch
            return self._take(ch) if ch.isprintable() and ch != "<" else self._fail()
        self._key = self._key.strip()
        if not self._key or self._key in self._keys:
            return self._fail()
        self._value = []
        return self._take(ch, self._in_value)

    def _in_value(self, ch: str) -> bool:
        self._take(ch)
        self._value.append(ch)
        if ch not in "=>":
            return True
        tail = "".join(self._value[-_LONGEST_END:])
        end = next((end for end in _VALUE_ENDS if tail.endswith(end)), None)
        if end is None:
            return True
        text = "".join(self._value[: -len(end)])
        value = convert(_without_line_breaks(text), self._schemas.get(self._name, {}), self._key)
        separator = ", " if self._keys else "{"
        self._keys.add(self._key)
        self._arguments(f"{separator}{json_text.dump(self._key)}: {json_text.dump(value)}")
        self._state = self._between
        if end != _END_PARAMETER:
            self._tag(end.strip())
        return True

    def _after_function(self, ch: str) -> bool:
        read = self._expect(ch, _END_TOOL_CALL)
        if read is None:
            return self._leave()
        return self._close() if read else True


def _without_line_breaks(text: str) -> str:
    """Less the one line break on either side that the format puts around a value."""
    return text.removeprefix("\n").removesuffix("\n")


def convert(text: str, parameters: Mapping[str, Any], key: str) -> Any:
    """The value of parameter `key` that `text` writes, of the type that the tool's schema gives it; else the text."""
    properties = parameters.get("properties")
    types = _types(properties.get(key) if isinstance(properties, dict) else None, parameters)
    stripped = text.strip()
    if "null" in types and stripped.lower() in ("null", "none"):
        return None
    if not types or "string" in types:
        return text
    if "boolean" in types and stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    try:
        value = json_text.load(stripped)
        json_text.dump(value)
    except ValueError:
        return text
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        return int(value)
    return value if _type_of(value) & types else text


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """The JSON types that a schema names itself, in alternatives, by enum values or through a local reference."""
    if not isinstance(schema, dict) or depth > 8:
        return set()
    named = schema.get("type")
    found = {kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)}
    for keyword in ("anyOf", "oneOf", "allOf"):
        for option in _list(schema.get(keyword)):
            found |= _types(option, root, depth + 1)
    if not found and isinstance(schema.get("$ref"), str):
        return _types(_resolve(schema["$ref"], root), root, depth + 1)
    if not found:
        values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
        return {name for value in values for name in _type_of(value)}
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _type_of(value: Any) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"}
        case str():
            return {"string"}
        case list():
            return {"array"}
    return {"object"}
