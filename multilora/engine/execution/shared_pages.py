"""Which decodes of a step begin with the same pages, so that their attention may read those once.

Whole pages are found, from the first one on, level by level, as a prefix cache has them: the page of a request's new
token is always its own. Called by `inputs.py`.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from multilora.batch import SharedPages
from multilora.kernels.integers import cdiv

Ints = npt.NDArray[np.int64]

FEWEST = 4
"""Requests that share pages, at least."""
SHORTEST = 64
"""Tokens that they share, at least."""
MOST_LEVELS = 4
"""How often those that share pages are divided by what they share further on. Each level costs time on the host, and
a partial result for each request."""
MOST_ROWS = 64
"""Requests of a step, at most: the host takes longer to launch more of them than it saves the GPU."""
WORTH = 196608
"""Tokens that need not be read again, of all requests together, from which on it is worth it. An H200 takes 2.5 ms
for so many of Llama-3.1-8B's, and the host up to as long to launch a step layer by layer."""


def find_shared(page_table: Ints, decodes: Ints, kv_lens: Ints, page_size: int) -> tuple[SharedPages, ...]:
    """Which of the requests `decodes`, which have one new token each, share how many pages; those of a request follow
    each other, at most MOST_LEVELS stretches. Empty where that is not worth it. page_table: [requests, blocks];
    kv_lens: [requests]."""
    if not FEWEST <= len(decodes) <= MOST_ROWS or int(kv_lens[decodes].sum()) < WORTH:
        return ()
    whole = (kv_lens - 1) // page_size  # pages before the one of the new token
    found = list(_levels(page_table, decodes, whole, 0, 0, max(1, cdiv(SHORTEST, page_size)), MOST_LEVELS))
    saved = sum((len(one.requests) - 1) * one.blocks for one in found) * page_size
    return tuple(found) if saved >= WORTH else ()


def _levels(
    table: Ints, members: Ints, whole: Ints, first: int, at: int, least: int, levels: int
) -> Iterator[SharedPages]:
    """Yields what some of `members` share. All of them have the pages up to `at` in common, and those from `first` on
    are in no stretch yet. levels: how many times they may still be divided."""
    if not levels:
        return
    long = members[whole[members] > at]
    long = long[np.argsort(table[long, at], kind="stable")]  # those with the same page beside each other
    ends = np.flatnonzero(np.diff(table[long, at], append=-1)) + 1
    starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends
    for begin, end in zip(
        starts[ends - starts >= FEWEST].tolist(), ends[ends - starts >= FEWEST].tolist(), strict=True
    ):
        own = long[begin:end]
        most = int(whole[own].min())
        differs = (table[own, at:most] != table[own[0], at:most]).any(0)
        stop = at + int(differs.argmax()) if differs.any() else most
        rest = first
        if stop - first >= least:
            yield SharedPages(tuple(own.tolist()), first, stop - first)
            rest = stop
        yield from _levels(table, own, whole, rest, stop, least, levels - 1)
