"""From the bytes of a JSON body to what a route's function takes.

What takes long in one native call, millions of tiny values, is refused by counting before. Called on a thread
(`request_body.py`) and in a process of its own (`body_process.py`).
"""

from array import array
from collections.abc import Iterator
from functools import cache
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError

from multilora.errors import BadRequest
from multilora.server import strict_json
from multilora.server.bodies import Body
from multilora.server.errors import from_validation

MAX_VALUES = 2_000_000
"""Numbers, texts and so on in one body."""
MAX_TEXTS = 500_000
"""Texts in one body, names of fields too: each of them is an object that takes 0.2 us and more to make, while nobody
else's code runs."""
MAX_CONTAINERS = 100_000
"""Lists and objects in one body."""
_COUNTED_AT_ONCE = 4 << 20  # bytes; other threads get their turn in between
_SORTED_AT_ONCE = 256 << 10  # bytes, sorted into texts and the rest; a few milliseconds
_PACKED_IDS = 256
"""Lists of as many token ids and more are packed."""


def body_values(body: bytes, kind: Any) -> Any:
    """Return what `body` holds as a value of the type `kind`: a class of bodies, or that or None. Raises
    BadRequest."""
    check_values(body)
    data = strict_json.decode(body)
    try:
        return _adapter(kind).validate_python(data, from_attributes=True)  # as FastAPI
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise from_validation(RequestValidationError([first | {"loc": ("body", *first["loc"])}])) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def pack_ids(value: Any) -> None:
    """Replace long lists of token ids in the prompts of a body by arrays, which are copied, and refused, at once."""
    for name in value.prompt_fields if isinstance(value, Body) else ():
        given = value.__dict__[name]
        if isinstance(given, list) and given and isinstance(given[0], list):
            value.__dict__[name] = [_packed(one) for one in given]
        else:
            value.__dict__[name] = _packed(given)


def _packed(given: Any) -> Any:
    """given: a validated field, so that all entries of a list are of one type."""
    if not isinstance(given, list) or len(given) < _PACKED_IDS or type(given[0]) is not int:
        return given
    try:
        return array("q", given)
    except OverflowError:  # no token's, as will be said
        return given


def check_values(body: bytes) -> None:
    """Raise BadRequest for more values, texts, or lists and objects than are decoded."""
    containers = _count(body, b"[") + _count(body, b"{")
    if _count(body, b'"') <= 2 * MAX_TEXTS and _count(body, b",") <= MAX_VALUES and containers <= MAX_CONTAINERS:
        return
    quotes = values = containers = 0
    for piece in _pieces(body):  # what is in texts does not count
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        bare = b"".join(parts[quotes % 2 :: 2])
        quotes += len(parts) - 1
        values += bare.count(b",")
        containers += bare.count(b"[") + bare.count(b"{")
        for number, most, what in (
            (quotes // 2, MAX_TEXTS, "texts"),
            (values, MAX_VALUES, "values"),
            (containers, MAX_CONTAINERS, "lists and objects"),
        ):
            if number > most:
                raise BadRequest(f"the body has over {most} {what}")


def _pieces(body: bytes) -> Iterator[bytes]:
    """The body in pieces, no escape in two of them. Other threads get their turn in between."""
    start = 0
    while start < len(body):
        piece = body[start : start + _SORTED_AT_ONCE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = body[start : start + len(piece) + 1]
        yield piece
        start += len(piece)


def _count(body: bytes, what: bytes) -> int:
    starts = range(0, len(body), _COUNTED_AT_ONCE)
    return sum(body.count(what, start, start + _COUNTED_AT_ONCE) for start in starts)
