"""Drafts by looking up: what followed when the last few tokens stood in the same request before (prompt lookup).

Owns a copy of one request's tokens and an index of them: for each bucket of windows of `smallest` tokens where the
latest one ended, for each of these the one before in its bucket, as in LZ77. A token costs the same wherever it
stands: it is entered once, and a look-up follows at most `CHAIN` earlier windows. Knows no requests and no
probabilities.
"""

from array import array
from collections.abc import Callable

from multilora.config import Config
from multilora.engine.scheduling.request import RequestSpec

CHAIN = 16  # earlier windows that one look-up compares
LEAST_BITS, MOST_BITS = 10, 16  # of the number of buckets: 4 KiB to 256 KiB for each request


class NgramDrafter:
    """smallest, largest: how many of the last tokens must, and at most do, stand before what is drafted; the longest
    match wins, the latest among equals. most_tokens: that there will be at most."""

    def __init__(self, smallest: int, largest: int, most_tokens: int):
        assert 1 <= smallest <= largest
        self._smallest = smallest
        self._largest = largest
        buckets = 1 << min(max(most_tokens.bit_length(), LEAST_BITS), MOST_BITS)
        self._mask = buckets - 1
        self._tokens = array("i")
        self._latest = array("i", [-1]) * buckets  # bucket → where its latest window ends
        self._earlier = array("i")  # end of a window → end of the one before in its bucket; -1: none

    @property
    def known(self) -> int:
        """How many tokens it has."""
        return len(self._tokens)

    def extend(self, tokens: list[int]) -> None:
        """The request's next tokens."""
        self._tokens.extend(tokens)

    def propose(self, count: int) -> list[int]:
        """What follows the tokens so far, `count` tokens or none."""
        self._enter()
        start = self._longest_match()
        if start is None:
            return []
        tokens, end = self._tokens, len(self._tokens)
        draft: list[int] = []
        for i in range(start, start + count):  # where the match reaches into the draft, that goes round
            draft.append(tokens[i] if i < end else draft[i - end])
        return draft

    def _enter(self) -> None:
        """Enter every window but the one at the end, which has no token after it yet."""
        size, tokens = self._smallest, self._tokens
        first = len(self._earlier)  # windows that end before here are entered
        self._earlier.extend([-1] * (min(size, len(tokens)) - first))  # the first tokens end no window
        first = max(first, size)
        if first >= len(tokens):
            return
        part = tokens[first - size : len(tokens) - 1]
        latest, mask, earlier = self._latest, self._mask, self._earlier
        for end, window in enumerate(zip(*(part[i:] for i in range(size)), strict=False), first):
            bucket = hash(window) & mask  # of integers: the same in every process
            earlier.append(latest[bucket])
            latest[bucket] = end

    def _longest_match(self) -> int | None:
        """Where the tokens that end the longest match do; None: there is none."""
        tokens, size = self._tokens, self._smallest
        if len(tokens) <= size:
            return None
        end = self._latest[hash(tuple(tokens[-size:])) & self._mask]
        best, longest = None, size - 1
        for _ in range(CHAIN):
            if end < 0 or longest == self._largest:
                break
            length = self._common(end)
            if length > longest:
                best, longest = end, length
            end = self._earlier[end]
        return best

    def _common(self, end: int) -> int:
        """How many tokens before `end` are the last ones of all."""
        tokens, last = self._tokens, len(self._tokens)
        most = min(self._largest, end)
        length = 0
        while length < most and tokens[end - 1 - length] == tokens[last - 1 - length]:
            length += 1
        return length


def ngram_drafters(config: Config) -> Callable[[RequestSpec], NgramDrafter]:
    """Makes the drafter of a request."""
    smallest = config.speculative_ngram_min_match_window_size
    largest = config.speculative_ngram_max_match_window_size
    return lambda spec: NgramDrafter(smallest, largest, spec.most_tokens)
