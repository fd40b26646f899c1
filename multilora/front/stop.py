"""Stop strings and stop expressions in text that arrives in pieces.

The matcher says where the text has to end, and how much of its end must not be shown yet because it may be the
beginning of a stop. It knows nothing of tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import regex

from multilora.errors import BadRequest

_TIMEOUT = 0.2  # seconds for one search: an expression can take exponential time


@dataclass(frozen=True)
class StopMatch:
    """start, end: in characters from the beginning of all text; matched: the stop string, or what a regex matched."""

    start: int
    end: int
    matched: str


class StopMatcher:
    """Of several matches the one that is complete first counts; of those, the one that starts first.

    held: how many characters at the end may be the beginning of a stop. Raises BadRequest for a bad expression.
    """

    def __init__(self, strings: list[str], regexes: list[str]):
        assert all(strings)
        self._strings = strings
        self._patterns = [_compile(r) for r in regexes]
        self._lookback = max((len(s) for s in strings), default=1) - 1
        self._text = ""  # with expressions: all text; else the last `lookback` characters before the next piece
        self._offset = 0  # of _text in all text fed
        self._past = -1  # expressions' matches that end here or before are passed over
        self.held = 0

    def feed(self, piece: str, *, may_match: bool = True) -> StopMatch | None:
        """The first match that ends in `piece`. While not `may_match`, matches are passed over for good.

        Raises BadRequest when an expression takes too long.
        """
        searched = len(self._text)  # no string ends here or before
        start = searched - self.held  # no expression can match from before
        self._text += piece
        if may_match and piece:
            matches = [*self._find_strings(searched), *self._find_regexes(start)]
            if matches:
                first = min(matches, key=lambda m: (m.end, m.start))
                return StopMatch(first.start + self._offset, first.end + self._offset, first.matched)
        if not may_match:
            self._past = len(self._text)
        self.held = max(self._held_by_strings(), self._held_by_regexes(start))
        if not self._patterns:
            cut = max(0, len(self._text) - self._lookback)
            self._text, self._offset = self._text[cut:], self._offset + cut
        return None

    def _find_strings(self, searched: int) -> Iterator[StopMatch]:
        for s in self._strings:
            start = self._text.find(s, max(0, searched - len(s) + 1))
            if start >= 0:
                yield StopMatch(start, start + len(s), s)

    def _held_by_strings(self) -> int:
        text, longest = self._text, 0
        for s in self._strings:
            lengths = range(min(len(s) - 1, len(text)), longest, -1)
            longest = next((k for k in lengths if text.endswith(s[:k])), longest)
        return longest

    def _find_regexes(self, start: int) -> Iterator[StopMatch]:
        for pattern in self._patterns:
            for m in self._search(pattern, start, partial=False):
                if m.end() > self._past:
                    yield StopMatch(m.start(), m.end(), m.group())
                    break

    def _held_by_regexes(self, start: int) -> int:
        """Until the end from the first place where a match begins that the next piece may complete or lengthen."""
        end = len(self._text)
        places = [end]
        for pattern in self._patterns:
            matches = self._search(pattern, start, partial=True)
            places.append(next((m.start() for m in matches if m.partial or m.end() == end), end))
        return end - min(places)

    def _search(self, pattern: "regex.Pattern[str]", start: int, *, partial: bool) -> Iterator["regex.Match[str]"]:
        try:
            yield from pattern.finditer(self._text, start, overlapped=True, partial=partial, timeout=_TIMEOUT)
        except TimeoutError:
            raise BadRequest(f"stop_regex {pattern.pattern!r} takes too long to match", param="stop_regex") from None


def _compile(expression: str) -> "regex.Pattern[str]":
    try:
        pattern = regex.compile(expression)
    except regex.error as e:
        raise BadRequest(f"stop_regex {expression!r} is not a regular expression: {e}", param="stop_regex") from None
    if pattern.search(""):
        raise BadRequest(f"stop_regex {expression!r} matches the empty text", param="stop_regex")
    return pattern
