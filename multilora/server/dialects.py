"""What the translating routes share: errors in the words of the client's dialect, and the reading of untyped JSON.

Called by `server/responses/`, `server/anthropic/`, and the OpenAI routes for the names of sampling parameters.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from multilora.errors import BadRequest
from multilora.front.tools.json_text import type_name


@contextlib.contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Raise a BadRequest of the block with our names replaced by those that the client has sent."""
    try:
        yield
    except BadRequest as e:
        message, param = e.message, e.param or ""
        for ours, theirs in names.items():
            message, param = message.replace(ours, theirs), param.replace(ours, theirs)
        raise type(e)(message, param=param or None) from None


def refused(path: str, what: str) -> BadRequest:
    """The error that names the field at `path`."""
    return BadRequest(f"{path}: {what}", param=path)


def an_object(value: Any, path: str) -> dict[str, Any]:
    """`value`, which has to be an object. Raises BadRequest."""
    if not isinstance(value, dict):
        raise refused(path, f"must be an object, not {type_name(value)}")
    return value


def a_list(value: Any, path: str) -> list[Any]:
    """`value`, which has to be an array. Raises BadRequest."""
    if not isinstance(value, list):
        raise refused(path, f"must be an array, not {type_name(value)}")
    return value


def a_string(parent: Mapping[str, Any], key: str, path: str) -> str:
    """Field `key` of the object at `path`, which has to be a string. Raises BadRequest."""
    value = parent.get(key)
    if not isinstance(value, str):
        raise refused(f"{path}.{key}", f"must be a string, not {type_name(value)}")
    return value


def text_part(text: str) -> dict[str, Any]:
    """Text as a part of a chat message."""
    return {"type": "text", "text": text}
