"""JSON texts as they may travel: no NaN, no infinities, no half of a surrogate pair."""

import json
from typing import Any


def load(text: str) -> Any:
    """The value of a JSON text. Raises ValueError; also for NaN, infinities and JSON nested too deeply."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dump(value: Any) -> str:
    """The JSON text of a value. Raises ValueError for what JSON or UTF-8 cannot hold."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    text.encode()
    return text


def load_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises ValueError."""
    value = load(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type_name(value)}, not an object")
    return value


def type_name(value: Any) -> str:
    """What JSON calls the type of `value`."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
