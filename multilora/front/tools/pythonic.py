"""Pythonic: `[f(a=1, b="x"), g()]`, as Llama 4, ToolACE and Llama 3.2's own prompt write calls.

The list may stand between `<|python_start|>` and `<|python_end|>`. Because nothing else marks it, a list counts only
when its first call is of an offered function. Arguments are keywords with literal values, read by `ast` and never
run; `true`, `false` and `null` are taken as models mean them, tuples as lists. Each call ends with its parenthesis.
"""

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

from multilora.front.tools import json_text
from multilora.front.tools.base import NewId, openai_call_id
from multilora.front.tools.definitions import Tool
from multilora.front.tools.scanner import CallScanner

MAX_DEPTH = 64  # of nested brackets in a value
_START = "<|python_start|>"
_END = "<|python_end|>"
_PAIRS = {")": "(", "]": "[", "}": "{"}
_ESCAPES = frozenset("\n\\'\"abfnrtvxuNU01234567")
_ARGUMENT = re.compile(r"\s*(\w+)\s*=(?!=)(.*)", re.DOTALL)
_WORDS = {"true": True, "false": False, "null": None}
_UNKNOWN = object()


class PythonicCalls(CallScanner):
    def __init__(self, tools: Sequence[Tool], new_id: NewId = openai_call_id):
        super().__init__(tools, new_id, markers=[_START, *(f"[{tool.name}(" for tool in tools)])
        self._name = ""
        self._tagged = False
        self._values: dict[str, Any] = {}
        self._argument = _ArgumentText()

    def _opened(self, marker: str) -> None:
        self._tagged = marker == _START
        if self._tagged:
            self._state = self._before_list
        else:
            self._begin_call(marker[1:-1])

    def _before_list(self, ch: str) -> bool:
        if ch.isspace():
            return self._take(ch)
        self._name = ""
        return self._take(ch, self._in_name) if ch == "[" else self._fail()

    def _in_name(self, ch: str) -> bool:
        if ch == "(":
            name = self._name.strip()
            if name not in self._names:
                return self._fail()
            self._begin_call(name)
            return self._take(ch)
        self._name += ch
        name = self._name.strip()
        possible = not name or any(known.startswith(name) for known in self._names)
        return self._take(ch) if possible else self._fail()

    def _begin_call(self, name: str) -> None:
        self._name = name
        self._values = {}
        self._argument = _ArgumentText()
        self._state = self._in_arguments

    def _in_arguments(self, ch: str) -> bool:
        end = self._argument.feed(ch)
        if end is None:
            return self._fail()
        if not end:
            return self._take(ch)
        text = self._argument.take()
        last_and_empty = ch == ")" and not text.strip()
        if not last_and_empty and not self._add(text):
            return self._fail()
        self._take(ch)
        if ch == ")":
            self._start(self._name)
            self._arguments(json_text.dump(self._values))
            self._end()
            self._state = self._after_parenthesis
        return True

    def _add(self, text: str) -> bool:
        parts = _ARGUMENT.fullmatch(text)
        if not parts or not parts[1].isidentifier() or parts[1] in self._values:
            return False
        value = _literal(parts[2])
        self._values[parts[1]] = value
        return value is not _UNKNOWN

    def _after_parenthesis(self, ch: str) -> bool:
        if ch == "]":
            self._taken = []
            self._state = self._after_list if self._tagged else None
            return True
        if ch == ",":
            self._name = ""
            return self._take(ch, self._in_name)
        return self._take(ch) if ch.isspace() else self._leave()

    def _after_list(self, ch: str) -> bool:
        read = self._expect(ch, _END)
        if read is None:
            return self._leave()
        return self._close() if read else True


class _ArgumentText:
    """Collects the text of one argument, up to the comma or parenthesis that ends it.

    Backslashes that Python would keep, with a warning, are doubled, so that `ast` has nothing to warn about.
    """

    def __init__(self) -> None:
        self._text: list[str] = []
        self._brackets: list[str] = []
        self._quote = ""
        self._raw = False  # of a string r"…"
        self._escaped = False

    def take(self) -> str:
        text = "".join(self._text)
        self._text = []
        return text

    def feed(self, ch: str) -> bool | None:
        """True: `ch` ends the argument; None: the brackets are wrong or too deep."""
        if self._quote:
            self._feed_string(ch)
        elif ch in ",)" and not self._brackets:
            return True
        elif ch in "\"'":
            self._raw = bool(self._text) and self._text[-1] in "rR"
            self._quote = ch
        elif ch in "([{":
            self._brackets.append(ch)
        elif ch in _PAIRS and (not self._brackets or self._brackets.pop() != _PAIRS[ch]):
            return None
        self._text.append(ch)
        return False if len(self._brackets) <= MAX_DEPTH else None

    def _feed_string(self, ch: str) -> None:
        if self._escaped:
            self._escaped = False
            if ch not in _ESCAPES and not self._raw:
                self._text.append("\\")
        elif ch == "\\":
            self._escaped = True
        elif ch == self._quote:
            self._quote = ""


def _literal(text: str) -> Any:
    """The value that a Python literal writes, as JSON can hold it; _UNKNOWN if there is none."""
    try:
        parsed = ast.parse(f"[{text.strip()}\n]", mode="eval").body
        (value,) = _value(parsed)  # in brackets a line break is no end, and a comment alone is no value
        json_text.dump(value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return _UNKNOWN
    return value


def _value(node: ast.expr) -> Any:
    """Raises ValueError for what is no literal."""
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as number)):
            if isinstance(number, bool) or not math.isfinite(number):
                raise ValueError("no number")
            return -number if isinstance(sign, ast.USub) else number
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("a key that is not a string")
