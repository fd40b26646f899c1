"""The tools and the tool choice of a request, checked at the door.

Pure functions over decoded JSON; every error is a BadRequest whose `param` is the path of the field. Called by
`request.py`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from multilora.errors import BadRequest
from multilora.front.tools import json_text

MAX_TOOLS = 512
MAX_BYTES = 1 << 20  # of all tools together, as JSON
MAX_DEPTH = 64  # of nested schemas
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_TYPES = frozenset(("string", "number", "integer", "boolean", "object", "array", "null"))
_CHOICES = ("auto", "none", "required")

# JSON Schema's keywords whose value is a schema, a list of schemas, or an object of schemas.
SCHEMA_KEYWORDS = frozenset(
    ("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
    + ("unevaluatedItems", "unevaluatedProperties")
)
LIST_KEYWORDS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
MAP_KEYWORDS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that the model may call. parameters: the JSON schema of its arguments; {}: it takes none."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """mode: "auto", "none", "required" or "named"; name: of the function when the mode is "named"."""

    mode: str
    name: str | None = None

    @property
    def forced(self) -> bool:
        """The answer must be a call, so a grammar makes it one."""
        return self.mode in ("required", "named")


def parse_tools(tools: Any) -> list[Tool]:
    """The tools of a chat request; none for null and for an empty list. Raises BadRequest."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise BadRequest(f"tools: must be an array, not {_shown(tools)}", param="tools")
    if len(tools) > MAX_TOOLS:
        raise BadRequest(f"tools: {len(tools)} tools; at most {MAX_TOOLS} are served", param="tools")
    _check_size(tools)
    parsed = [_parse_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    seen: dict[str, int] = {}
    for i, tool in enumerate(parsed):
        if tool.name in seen:
            path = f"tools[{i}].function.name"
            raise BadRequest(f"{path} = {tool.name!r}: tools[{seen[tool.name]}] has this name too", param=path)
        seen[tool.name] = i
    return parsed


def parse_tool_choice(choice: Any, tools: Sequence[Tool]) -> ToolChoice:
    """What `tool_choice` asks for; null means "auto" with tools and "none" without. Raises BadRequest."""
    param = "tool_choice"
    if choice is None:
        return ToolChoice("auto" if tools else "none")
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise BadRequest(
                f"{param} = {choice!r}: must be one of {', '.join(_CHOICES)}, or name a function", param=param
            )
        if choice == "required" and not tools:
            raise BadRequest(f"{param} = 'required': the request has no tools", param=param)
        return ToolChoice(choice if tools else "none")
    if not isinstance(choice, dict):
        raise BadRequest(f"{param}: must be a string or an object, not {_shown(choice)}", param=param)
    kind = choice.get("type", "function")
    if kind != "function":
        raise BadRequest(f"{param}.type = {_shown(kind)}: only 'function' is served", param=f"{param}.type")
    function = choice.get("function", choice)  # the Responses API has the name beside the type
    name = function.get("name") if isinstance(function, dict) else None
    path = f"{param}.function.name"
    if not isinstance(name, str):
        raise BadRequest(f"{path}: must be the name of a function, not {_shown(name)}", param=path)
    if name not in (tool.name for tool in tools):
        raise BadRequest(f"{path} = {name!r}: no tool of the request has this name", param=path)
    return ToolChoice("named", name)


def _check_size(tools: list[Any]) -> None:
    try:
        size = len(json_text.dump(tools).encode())
    except ValueError as e:
        raise BadRequest(f"tools: not JSON: {e}", param="tools") from None
    if size > MAX_BYTES:
        raise BadRequest(f"tools: {size} bytes of JSON; at most {MAX_BYTES} are served", param="tools")


def function_of(value: Any, path: str) -> dict[str, Any]:
    """The `function` of a tool or of a call, {"type": "function", "function": {…}}. Raises BadRequest."""
    if not isinstance(value, dict):
        raise BadRequest(f"{path}: must be an object, not {json_text.type_name(value)}", param=path)
    kind = value.get("type", "function")
    if kind != "function":
        raise BadRequest(f"{path}.type = {_shown(kind)}: only 'function' is served", param=f"{path}.type")
    function = value.get("function")
    if not isinstance(function, dict):
        path = f"{path}.function"
        raise BadRequest(f"{path}: must be an object, not {json_text.type_name(function)}", param=path)
    return function


def _parse_tool(tool: Any, path: str) -> Tool:
    function = function_of(tool, path)
    path = f"{path}.function"
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadRequest(
            f"{path}.name = {_shown(name)}: must be 1 to 128 letters, digits, '_', '-', '.', ':' or '/'",
            param=f"{path}.name",
        )
    description = _optional(function, "description", str, path) or ""
    strict = _optional(function, "strict", bool, path) or False
    parameters = _optional(function, "parameters", dict, path) or {}
    check_parameters(parameters, f"{path}.parameters")
    return Tool(name, description, parameters, strict)


def _optional(function: dict[str, Any], key: str, kind: type, path: str) -> Any:
    value = function.get(key)
    if value is not None and not isinstance(value, kind):
        expected = {str: "a string", bool: "a boolean", dict: "an object"}[kind]
        raise BadRequest(f"{path}.{key}: must be {expected}, not {_shown(value)}", param=f"{path}.{key}")
    return value


def check_parameters(schema: Mapping[str, Any], path: str) -> None:
    """Raise BadRequest unless `schema` can be the schema of a function's arguments, which are always an object."""
    kind = schema.get("type", "object")
    if kind != "object":
        raise BadRequest(f"{path}.type = {_shown(kind)}: the arguments of a function are an object", param=path)
    for where, inner in schemas_in(schema, path, 0):
        kinds = inner.get("type")
        if not all(isinstance(kind, str) for kind in (kinds if isinstance(kinds, list) else [kinds or ""])):
            raise BadRequest(f"{where}.type: must be a string or an array of strings", param=f"{where}.type")
        required = inner.get("required")
        if required is not None and not (isinstance(required, list) and all(isinstance(r, str) for r in required)):
            raise BadRequest(
                f"{where}.required: must be an array of strings, not {_shown(required)}", param=f"{where}.required"
            )


def check_constrainable(tools: Sequence[Tool]) -> None:
    """Raise BadRequest for what may stand in a prompt but not in a grammar: types that JSON has not, references that
    lead elsewhere. tools: all tools of the request."""
    for i, tool in enumerate(tools):
        for where, inner in schemas_in(tool.parameters, f"tools[{i}].function.parameters", 0):
            kinds = inner.get("type")
            for kind in kinds if isinstance(kinds, list) else [] if kinds is None else [kinds]:
                if kind not in _TYPES:
                    known = ", ".join(sorted(_TYPES))
                    raise BadRequest(f"{where}.type = {_shown(kind)}: must be one of {known}", param=f"{where}.type")
            ref = inner.get("$ref", "#")
            if not isinstance(ref, str) or not re.match(r"#(/|$)", ref):
                path = f"{where}.$ref"
                raise BadRequest(f"{path} = {_shown(ref)}: only references within the schema are served", param=path)


def schemas_in(schema: Any, path: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, schema) of a schema and of all schemas in it. Raises BadRequest where something else stands for one."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise BadRequest(f"{path}: must be a schema, not {_shown(schema)}", param=path)
    if depth > MAX_DEPTH:
        raise BadRequest(f"{path}: nested more than {MAX_DEPTH} schemas deep", param=path)
    yield path, schema
    for key, value in schema.items():
        where = f"{path}.{key}"
        if key in MAP_KEYWORDS:
            if not isinstance(value, Mapping):
                raise BadRequest(f"{where}: must be an object of schemas, not {_shown(value)}", param=where)
            for name, inner in value.items():
                yield from schemas_in(inner, f"{where}.{name}", depth + 1)
        elif key in LIST_KEYWORDS and (isinstance(value, list) or key not in SCHEMA_KEYWORDS):
            if not isinstance(value, list):
                raise BadRequest(f"{where}: must be an array of schemas, not {_shown(value)}", param=where)
            for i, inner in enumerate(value):
                yield from schemas_in(inner, f"{where}[{i}]", depth + 1)
        elif key in SCHEMA_KEYWORDS:
            yield from schemas_in(value, where, depth + 1)


def _shown(value: Any) -> str:
    """A value in an error message: scalars as they are, arrays and objects by their type."""
    if isinstance(value, list | dict):
        return json_text.type_name(value)
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
