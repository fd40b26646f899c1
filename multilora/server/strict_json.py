"""JSON as the standard has it, and which field of a body holds a number that is none.

Decodes to Python's objects: no NaN, no infinities, no lone surrogates. What is wrong with a number is said with the
field that it is in; for that, and only after decoding has failed, the body is read once more, in time linear in its
length. Called by `body_values.py` and `strict_route.py`.
"""

import math
import re
from typing import Any

import msgspec

from multilora.errors import BadRequest

MAX_READ = 256 << 10
"""Bytes of a body that are read again to find what is wrong."""
MAX_DIGITS = 4300
"""Digits that an integer may have: Python's own limit."""

_PARTS = re.compile(
    rb"""
    (?P<text>" (?P<content>(?:[^"\\]++|\\.)*+) "?) (?P<colon>\s*+:)?+
  | (?P<opens>[{\[])
  | (?P<closes>[}\]])
  | (?P<number>(?<![\w.+-]) -?+ (?:(?:NaN|Infinity)\b | \d{200,}+ (?:\.\d++)?+ (?:[eE][+-]?+\d++)?+
      | \d++ (?:\.\d++)?+ [eE]\+?+\d{3,}+))
    """,
    re.VERBOSE | re.DOTALL,
)
"""Everything but numbers that are surely fine. Nothing in it goes back, so that no body takes long."""


def decode(body: bytes) -> Any:
    """Raises BadRequest, which names the field where a number is to blame."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise _bad_number(body) or BadRequest(f"the body is not valid JSON: {e}") from None
    except RecursionError:
        raise BadRequest("the body is not valid JSON: nested too deeply") from None


def _bad_number(body: bytes) -> BadRequest | None:
    """The error about the first number that cannot be read; None: that is not what is wrong."""
    outside: list[str] = []  # the names around
    name = ""
    for part in _PARTS.finditer(body, 0, MAX_READ):
        if part["number"] is not None:
            if (fault := _fault(part["number"])) is not None:
                return _error([one for one in (*outside, name) if one], part["number"].decode(), fault)
        elif part["opens"] is not None:
            outside.append(name)
            name = ""
        elif part["closes"] is not None:
            name = outside.pop() if outside else ""
        elif part["colon"] is not None:
            name = part["content"][:64].decode(errors="replace")
    return None


def _fault(number: bytes) -> str | None:
    if not math.isfinite(float(number)):
        whole = number.removeprefix(b"-")
        if not whole.isdigit():
            return "a number has to be finite"
        if len(whole) > MAX_DIGITS:
            return f"an integer has at most {MAX_DIGITS} digits"
    return None


def _error(names: list[str], number: str, fault: str) -> BadRequest:
    shown = number if len(number) <= 40 else f"{number[:37]}..."
    where = f"{'.'.join(names[:8])} = " if names else ""
    own = names[1:] if names[:1] == ["sampling_params"] else names  # as other errors about these name them
    param = next(iter(own or names), None)
    return BadRequest(f"the body is not valid JSON: {where}{shown}: {fault}", param=param)
