"""Stop strings and stop expressions in text that arrives in pieces.

The matcher says where the text has to end, and how much of its end must not be shown yet because it may be the
beginning of a stop. Its work per character depends neither on how many strings there are nor, but for a bounded
factor, on the expressions (`stop_expression.py`). It knows nothing of tokens.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter

from multilora.errors import BadRequest
from multilora.front.stop_expression import StopExpression

MAX_HELD = 2048
"""Bytes of text that may wait for an expression to be completed; a match that began before them is given up."""
MAX_SECONDS = 1.0
"""For all searches of one matcher: an expression whose automaton outgrows its memory may take 30 ms a piece."""


@dataclass(frozen=True)
class StopMatch:
    """start, end: in characters from the beginning of all text; matched: the stop string, or what a regex matched."""

    start: int
    end: int
    matched: str


class StopMatcher:
    """Finds the first stop in a text: the match that is complete first, and of those the one that starts first.

    held: how many characters at the end may be the beginning of a stop. Raises BadRequest for a bad expression.
    """

    def __init__(self, strings: Sequence[str], regexes: Sequence[str]):
        assert all(strings)
        self._strings = _Strings(strings)
        self._expressions = _Expressions([_expression(r) for r in regexes]) if regexes else None
        self._seconds = 0.0
        self.held = 0

    def feed(self, piece: str, *, may_match: bool = True) -> StopMatch | None:
        """The first match that ends in `piece`. While not `may_match`, matches are passed over for good.

        Raises BadRequest when the expressions have taken too long in all.
        """
        matches = list(self._strings.feed(piece, may_match=may_match))
        self.held = self._strings.held
        if self._expressions is not None:
            start = perf_counter()
            matches += self._expressions.feed(piece, may_match=may_match)
            self._seconds += perf_counter() - start
            if self._seconds > MAX_SECONDS and not matches:
                raise BadRequest("stop_regex takes too long to match", param="stop_regex")
            self.held = max(self.held, self._expressions.held)
        return min(matches, key=lambda m: (m.end, m.start), default=None)


@dataclass(slots=True)
class _Node:
    """A beginning of strings. depth: its length; fallback: the longest other beginning that it ends with; found: the
    longest whole string that it ends with; open: the longest beginning, itself included, that it ends with and that
    is not the whole of every string that begins with it."""

    depth: int
    next: "dict[str, _Node]" = field(default_factory=dict)
    fallback: "_Node | None" = None
    found: str = ""
    open: int = 0


class _Strings:
    """Aho and Corasick's automaton ("Efficient string matching", 1975): all strings in one pass over the text."""

    def __init__(self, strings: Sequence[str]):
        self._root = _automaton(tuple(strings))
        self._node = self._root
        self._size = 0  # characters fed

    @property
    def held(self) -> int:
        return self._node.open

    def feed(self, piece: str, *, may_match: bool) -> Iterator[StopMatch]:
        """The first match, if there is one; of those that end together, the longest."""
        if not self._root.next:
            return
        node = self._node
        for count, char in enumerate(piece, self._size + 1):
            while char not in node.next and node.fallback is not None:
                node = node.fallback
            node = node.next.get(char, node)
            if node.found and may_match:
                yield StopMatch(count - len(node.found), count, node.found)
                return
        self._node, self._size = node, self._size + len(piece)


@lru_cache(maxsize=16)  # the samples of a request share one
def _automaton(strings: tuple[str, ...]) -> _Node:
    root = _Node(0)
    for string in strings:
        node = root
        for end, char in enumerate(string, 1):
            node = node.next.setdefault(char, _Node(end))
        node.found = string
    waiting = deque([root])
    while waiting:
        parent = waiting.popleft()
        for char, node in parent.next.items():
            behind = parent.fallback
            while behind is not None and char not in behind.next:
                behind = behind.fallback
            node.fallback = root if behind is None else behind.next[char]
            node.found = node.found or node.fallback.found
            node.open = node.depth if node.next else node.fallback.open
            waiting.append(node)
    return root


@lru_cache(maxsize=16)
def _expression(source: str) -> StopExpression:
    return StopExpression.compile(source)


class _Expressions:
    """The text that expressions may still need, as UTF-8."""

    def __init__(self, expressions: Sequence[StopExpression]):
        self._expressions = expressions
        self._text = b""  # from one character before what is held, which `\\b` looks at
        self._before = 0  # characters before it
        self._start = 0  # in it: no match that counts begins before
        self._past = -1  # in it: matches that end here or before are passed over
        self.held = 0

    def feed(self, piece: str, *, may_match: bool) -> Iterator[StopMatch]:
        self._text += piece.encode()
        if may_match and piece:
            found = [m for m in map(self._find, self._expressions) if m is not None]
            if found:
                yield from found
                return
        if not may_match:
            self._past = len(self._text)
        self._hold()

    def _find(self, expression: StopExpression) -> StopMatch | None:
        text, at = self._text, self._start
        while (match := expression.match.search(text, at)) is not None:
            start, end = match.span()
            if end > self._past:
                begin = self._before + _characters(text[:start])
                matched = text[start:end].decode()
                return StopMatch(begin, begin + len(matched), matched)
            at = _next(text, start)
            if start == len(text):
                break
        return None

    def _hold(self) -> None:
        """Hold the text from the first place on where a match begins that the next piece may complete or lengthen."""
        text = self._text
        places = [len(text)]
        for expression in self._expressions:
            begun = expression.prefix.search(text, self._start)
            places.append(len(text) if begun is None else begun.start())
        start = max(min(places), _next(text, len(text) - MAX_HELD - 1) if len(text) > MAX_HELD else 0)
        self.held = _characters(text[start:])
        cut = _previous(text, start)
        self._before += _characters(text[:cut])
        self._text, self._start, self._past = text[cut:], start - cut, self._past - cut


def _characters(text: bytes) -> int:
    """How many there are in UTF-8."""
    return len(text.decode())


def _next(text: bytes, at: int) -> int:
    """Where the character after the one at, or around, `at` begins."""
    at += 1
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def _previous(text: bytes, at: int) -> int:
    """Where the character before `at` begins; 0 at the beginning."""
    at = max(0, at - 1)
    while at and text[at] & 0xC0 == 0x80:
        at -= 1
    return at
