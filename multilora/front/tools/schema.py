"""What constrained decoding must know so that an answer is a call: JSON schemas and structural tags.

`tool_choice` "required" and a named function become a JSON schema, read back by `forced.py`; `strict` tools under
"auto" become a structural tag in the model family's own format, read back by that family's parser. Knows no compiler.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from multilora.front.tools.definitions import (
    LIST_KEYWORDS,
    MAP_KEYWORDS,
    SCHEMA_KEYWORDS,
    Tool,
    ToolChoice,
    check_constrainable,
)

MAX_WHITESPACE = 8
"""White-space characters in one place of a call's arguments: without a bound a model may emit them for ever."""


def forced_schema(choice: ToolChoice, tools: Sequence[Tool], *, parallel: bool = True) -> dict[str, Any] | None:
    """The JSON schema that the whole answer has to follow; None: the choice forces nothing.

    parallel: whether a "required" answer may hold more than one call (`parallel_tool_calls`). Raises BadRequest for
    a tool whose schema no grammar can follow.
    """
    if choice.forced:
        check_constrainable(tools)
    if choice.mode == "named":
        return parameters_schema(next(tool for tool in tools if tool.name == choice.name))
    if choice.mode == "required":
        return required_schema(tools, parallel=parallel)
    return None


def parameters_schema(tool: Tool) -> dict[str, Any]:
    """The schema of one function's arguments; of a function without parameters: an empty object."""
    if not tool.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.parameters}


def required_schema(tools: Sequence[Tool], *, parallel: bool = True) -> dict[str, Any]:
    """The schema of `[{"name": …, "parameters": {…}}, …]`: one call or more, without `parallel` exactly one.

    Each tool's own schema stands under "$defs" by the tool's number, and the references in it are led there, so that
    the definitions of two tools never meet.
    """
    calls = [_call_schema(tool, f"#/$defs/{i}") for i, tool in enumerate(tools)]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return schema | {"$defs": {str(i): _moved(parameters_schema(t), f"#/$defs/{i}") for i, t in enumerate(tools)}}


def _call_schema(tool: Tool, parameters: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": {"$ref": parameters}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str) -> Any:
    """`schema`, whose root will stand at the pointer `root`, with its local references led there."""
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref":
            moved[key] = root + value.removeprefix("#")
        elif key in MAP_KEYWORDS:
            moved[key] = {name: _moved(inner, root) for name, inner in value.items()}
        elif key in LIST_KEYWORDS and isinstance(value, list):
            moved[key] = [_moved(inner, root) for inner in value]
        elif key in SCHEMA_KEYWORDS:
            moved[key] = _moved(value, root)
        else:
            moved[key] = value
    return moved


def strict_tag(
    tools: Sequence[Tool], trigger: str, begin: str, end: str, *, parallel: bool = True
) -> dict[str, Any] | None:
    """A structural tag: free text, but what follows `trigger` is a call, and strict tools' arguments are valid.

    None: no tool is strict. begin, end: what stands before and after a call's arguments in the family's format,
    "{name}" being the name in `begin`. Arguments of tools that are not strict may be any object. Raises BadRequest.
    """
    if not any(tool.strict for tool in tools):
        return None
    check_constrainable(tools)
    tags = [
        {
            "type": "tag",
            "begin": begin.replace("{name}", tool.name),
            "content": {
                "type": "json_schema",
                "json_schema": parameters_schema(tool) if tool.strict else {"type": "object"},
                "max_whitespace_cnt": MAX_WHITESPACE,
            },
            "end": end,
        }
        for tool in tools
    ]
    triggered = {"type": "triggered_tags", "triggers": [trigger], "tags": tags, "stop_after_first": not parallel}
    return {"type": "structural_tag", "format": triggered}
