"""Chat messages as chat templates want them: what clients send, checked and brought into one form.

Pure function, list of dicts to list of dicts; the argument is not changed. Called before every rendering.
"""

from collections.abc import Sequence
from typing import Any

from multilora.errors import BadRequest
from multilora.front.tools import json_text
from multilora.front.tools.definitions import function_of

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def prepare_messages(messages: Sequence[dict[str, Any]], *, knows_developer: bool = False) -> list[dict[str, Any]]:
    """The messages with one text as content, and the arguments of calls as objects.

    Null fields and empty `tool_calls` are left out; `content` is always there. knows_developer: the template has a
    "developer" role; else such messages are system messages. Raises BadRequest naming field and value.
    """
    return [_prepare(message, f"messages[{i}]", knows_developer) for i, message in enumerate(messages)]


def _prepare(message: Any, path: str, knows_developer: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRequest(f"{path}: must be an object, not {json_text.type_name(message)}", param=path)
    role = message.get("role")
    if role not in ROLES:
        raise BadRequest(f"{path}.role = {role!r}: must be one of {', '.join(ROLES)}", param=f"{path}.role")
    prepared = {key: value for key, value in message.items() if value is not None}
    if role == "developer" and not knows_developer:
        prepared["role"] = "system"
    calls = prepared.pop("tool_calls", None)
    if role == "assistant":
        _refuse_function_call(prepared, path)
        if calls is not None and (parsed := _calls(calls, f"{path}.tool_calls")):
            prepared["tool_calls"] = parsed
        if "reasoning" in prepared:  # vLLM's name of the field that templates call reasoning_content
            prepared.setdefault("reasoning_content", prepared["reasoning"])
    elif calls:
        raise BadRequest(f"{path}.tool_calls: only assistant messages have calls", param=f"{path}.tool_calls")
    if not isinstance(prepared.get("tool_call_id", ""), str):
        where = f"{path}.tool_call_id"
        raise BadRequest(f"{where} = {prepared['tool_call_id']!r}: must be a string", param=where)
    if "content" not in prepared and role != "assistant":
        raise BadRequest(f"{path}.content: a message of role {role!r} needs content", param=f"{path}.content")
    prepared["content"] = _text(prepared.get("content", ""), f"{path}.content")
    return prepared


def _refuse_function_call(message: dict[str, Any], path: str) -> None:
    if message.pop("function_call", None):
        where = f"{path}.function_call"
        raise BadRequest(f"{where}: is not served; tool_calls has taken its place", param=where)


def _text(content: Any, path: str) -> str:
    """The text of a message, its parts joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        kind = json_text.type_name(content)
        raise BadRequest(f"{path}: must be a string or an array of parts, not {kind}", param=path)
    return "\n".join(_part(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else json_text.type_name(part)
    if kind != "text" or not isinstance(part, dict):
        raise BadRequest(f"{path}.type = {kind!r}: only parts of type 'text' are served", param=f"{path}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRequest(f"{path}.text: must be a string, not {json_text.type_name(text)}", param=f"{path}.text")
    return text


def _calls(calls: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise BadRequest(f"{path}: must be an array, not {json_text.type_name(calls)}", param=path)
    return [_call(call, f"{path}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, path: str) -> dict[str, Any]:
    function = function_of(call, path)
    path = f"{path}.function"
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadRequest(f"{path}.name = {name!r}: must be the name of a function", param=f"{path}.name")
    arguments = _arguments(function.get("arguments"), f"{path}.arguments")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _arguments(arguments: Any, path: str) -> dict[str, Any]:
    """The object that templates iterate over; null and "" mean no arguments."""
    if isinstance(arguments, dict):
        return arguments
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        kind = json_text.type_name(arguments)
        raise BadRequest(f"{path}: must be a string that holds a JSON object, not {kind}", param=path)
    try:
        return json_text.load_object(arguments)
    except ValueError as e:
        shown = arguments if len(arguments) <= 80 else f"{arguments[:77]}..."
        raise BadRequest(f"{path} = {shown!r}: must hold a JSON object: {e}", param=path) from None
