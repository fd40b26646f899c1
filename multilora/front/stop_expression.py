"""User's stop expressions, compiled by RE2: matching takes time linear in the text, compiling bounded memory.

Besides the expression itself there is its *prefix expression*, which matches every beginning of a match that reaches
the end of the text. It tells which text may still become a stop. RE2 has no partial matching, so it is made here from
the parsed expression: the beginnings of `xy` are those of `x`, and `x` with a beginning of `y`; those of `x{n,m}` are
up to m - 1 times `x` with a beginning of one more. Called by `stop.py`; knows nothing of streams.
"""

from dataclasses import dataclass

import re2

from multilora.errors import BadRequest

MAX_CHARACTERS = 512  # of one expression
MAX_PROGRAM = 4000  # RE2 instructions of one expression or its prefix expression: what a step of the search may cost
MAX_MEMORY = 2 << 20  # bytes of RE2's program and automaton
MAX_DEPTH = 50  # groups within groups
_OCTAL = tuple("01234567")
_REPEATS = {"*": None, "+": None, "?": 1}


@dataclass(frozen=True)
class StopExpression:
    """`match` finds the stop, `prefix` what may become one; both search UTF-8 bytes."""

    source: str
    match: "re2._Regexp"
    prefix: "re2._Regexp"

    @classmethod
    def compile(cls, source: str) -> "StopExpression":
        """Raises BadRequest for what is no expression, is too large, matches empty text, or RE2 cannot do."""
        if len(source) > MAX_CHARACTERS:
            raise _refused(source, f"has {len(source)} characters, at most {MAX_CHARACTERS} are allowed")
        match = _compile(source, source)
        if match.search(b""):
            raise _refused(source, "matches the empty text")
        return cls(source, match, _compile(rf"(?:{_Prefixes(source).all()})\z", source))


def _compile(pattern: str, source: str) -> "re2._Regexp":
    options = re2.Options()
    options.max_mem = MAX_MEMORY
    options.log_errors = False
    try:
        compiled = re2._Regexp(pattern.encode(), options)  # noqa: SLF001 - `re2.compile` keeps the last 128 for ever
    except UnicodeEncodeError:
        raise _refused(source, "is not valid Unicode") from None
    except re2.error as e:
        raise _refused(source, _reason(e.args[0])) from None
    if compiled.programsize > MAX_PROGRAM:
        raise _refused(source, "is too large: repeat less, or fewer alternatives")
    return compiled


def _reason(error: bytes | str) -> str:
    """RE2's message, with its word for what it deliberately does not have."""
    text = error.decode(errors="replace") if isinstance(error, bytes) else error
    if text.startswith("invalid perl operator: (?"):
        return "uses lookaround or another construct that no linear-time engine has: " + text.rpartition(" ")[2]
    if text.startswith("invalid escape sequence") and text[-1].isdigit():
        return f"uses a backreference, which no linear-time engine has: {text.rpartition(' ')[2]}"
    return f"is not a regular expression: {text}"


def _refused(source: str, reason: str) -> BadRequest:
    shown = source if len(source) <= 80 else source[:77] + "..."
    return BadRequest(f"stop_regex {shown!r} {reason}", param="stop_regex")


class _Prefixes:
    """One pass over an expression that RE2 has accepted. Every method returns two expressions: for what it has read,
    and for all beginnings of that, itself and the empty text included."""

    def __init__(self, source: str):
        self._source = source
        self._at = 0
        self._depth = 0

    def all(self) -> str:
        return self._alternatives("")[1]

    def _peek(self, text: str) -> bool:
        return self._source.startswith(text, self._at)

    def _take(self, count: int = 1) -> str:
        taken = self._source[self._at : self._at + count]
        self._at += count
        return taken

    def _until(self, end: str) -> str:
        """Everything up to and with `end`."""
        found = self._source.find(end, self._at)
        return self._take((len(self._source) if found < 0 else found + len(end)) - self._at)

    def _alternatives(self, flags: str) -> tuple[str, str]:
        """flags: of i, m and s those in effect. A flag set in one alternative holds in the later ones, too."""
        full: list[str] = []
        begun: list[str] = []
        while True:
            sequence, flags = self._sequence(flags)
            full.append("".join(item for item, _ in sequence))
            nested = ""
            for item, beginnings in reversed(sequence):
                nested = f"(?:{item}{nested}|{beginnings})"
            begun.append(nested)
            if not self._peek("|"):
                return f"(?:{'|'.join(full)})", f"(?:{'|'.join(begun)})"
            self._take()

    def _sequence(self, flags: str) -> tuple[list[tuple[str, str]], str]:
        items: list[tuple[str, str]] = []
        while self._at < len(self._source) and not self._peek("|") and not self._peek(")"):
            if self._peek("(?") and (switched := self._flags(flags)) is not None:
                flags = switched
                continue
            if self._peek("\\Q"):
                self._take(2)
                items += [_leaf(re2.escape(c), flags) for c in self._until("\\E").removesuffix("\\E")]
            else:
                items.append(self._atom(flags))
            while items and (bounds := self._bounds()) is not None:
                items.append(_repeated(items.pop(), *bounds))
        return items, flags

    def _flags(self, flags: str) -> str | None:
        """The flags after `(?i-s)`; None, with nothing read, if that is not what comes."""
        end = self._at + 2
        while end < len(self._source) and self._source[end] in "imsU-":
            end += 1
        if self._source[end : end + 1] != ")":
            return None
        return _switched(flags, self._take(end + 1 - self._at)[2:-1])

    def _atom(self, flags: str) -> tuple[str, str]:
        first = self._take()
        if first == "(":
            return self._group(flags)
        if first == "[":
            return _leaf(first + self._class(), flags)
        if first == "\\":
            return _leaf(first + self._escape(), flags)
        return _leaf(first, flags)

    def _group(self, flags: str) -> tuple[str, str]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(self._source, f"has over {MAX_DEPTH} groups within one another")
        if self._peek("?"):
            named = self._peek("?P<") or self._peek("?<")
            head = self._until(">" if named else ":")
            flags = flags if named else _switched(flags, head[1:-1])
        inner = self._alternatives(flags)
        self._take()
        self._depth -= 1
        return inner

    def _class(self) -> str:
        """The rest of a character class."""
        text = self._take() if self._peek("^") else ""
        text += self._take() if self._peek("]") else ""
        while not self._peek("]"):
            if self._peek("[:"):
                text += self._until(":]")
            elif self._peek("\\"):
                text += self._take() + self._escape()
            else:
                text += self._take()
        return text + self._take()

    def _escape(self) -> str:
        """What belongs to a backslash."""
        letter = self._take()
        if letter in "pPx" and self._peek("{"):
            return letter + self._until("}")
        if letter in "pP":
            return letter + self._take()
        if letter == "x":
            return letter + self._take(2)
        if letter in _OCTAL:
            while len(letter) < 3 and self._source[self._at : self._at + 1] in _OCTAL:
                letter += self._take()
        return letter

    def _bounds(self) -> tuple[int, int | None] | None:
        """The least and the most that the quantifier, if one comes, repeats; whether it is greedy does not matter."""
        start = self._at
        if self._source[start : start + 1] in tuple(_REPEATS):
            sign = self._take()
            bounds = (int(sign == "+"), _REPEATS[sign])
        elif self._peek("{"):
            low, comma, high = self._until("}")[1:-1].partition(",")
            if not low.isdecimal() or not (high.isdecimal() or not high):
                self._at = start  # RE2 takes other braces as they are
                return None
            bounds = (int(low), int(high) if high else None if comma else int(low))
        else:
            return None
        if self._peek("?"):
            self._take()
        return bounds


def _switched(flags: str, change: str) -> str:
    on, _, off = change.partition("-")
    return "".join(f for f in "ims" if (f in flags or f in on) and f not in off)


def _leaf(text: str, flags: str) -> tuple[str, str]:
    """One character, class or assertion."""
    text = f"(?{flags}:{text})" if flags else text
    return text, f"(?:{text})?"


def _repeated(item: tuple[str, str], low: int, high: int | None) -> tuple[str, str]:
    full, beginnings = item
    if high == 0:
        return "(?:)", "(?:)"
    upper = "" if high is None else str(high)
    before = f"(?:{full})*" if high is None else f"(?:{full}){{0,{high - 1}}}" if high > 1 else ""
    return f"(?:{full}){{{low},{upper}}}", before + beginnings
