"""Hidden rows in, one row per prompt out: the last token's, the first one's, or the mean of all.

Owns what lasts from chunk to chunk of a prompt, by slot: a sum or a row in fp32 on the device. Steps are pooled in
the order in which they run. Knows no head and no scaling: see `runner.py`. A row depends on its prompt alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from multilora.engine.plan import Chunk
from multilora.transfer import download, upload


@dataclass(frozen=True)
class PooledRows:
    """What came of the prompts that end in a step, in the order of their chunks. rows: fp32 [n, hidden], of those
    that go through no head; scores: fp32 [m, most labels], of the others, -inf behind a row's labels."""

    rows: Tensor | None
    scores: Tensor | None

    def to_cpu(self) -> "PooledRows":
        """Start to copy to the host: complete once a `Fence` made afterwards has passed."""
        return PooledRows(*(None if part is None else download(part) for part in (self.rows, self.scores)))

    def by_chunk(self, chunks: Sequence[Chunk]) -> dict[int, bytes]:
        """On the host: by the number of its chunk in the plan, float32 numbers, little-endian."""
        rows, scores = (iter(()) if p is None else iter(p.numpy().astype("<f4")) for p in (self.rows, self.scores))
        found = {}
        for i, chunk in enumerate(chunks):
            if chunk.pooling is not None and chunk.pooling.ends:
                row = next(scores if chunk.pooling.params.scores else rows)
                found[i] = (row[~np.isneginf(row)] if chunk.pooling.params.scores else row).tobytes()
        return found


class Pooler:
    """What prompts that are not complete have come to so far."""

    def __init__(self) -> None:
        self._partial: dict[int, Tensor] = {}  # fp32 [hidden], by slot

    def free(self, slot: int) -> None:
        """The request at the slot has ended."""
        self._partial.pop(slot, None)

    def pool(self, chunks: Sequence[Chunk], hidden: Tensor) -> Tensor | None:
        """hidden: [tokens, hidden], the rows of the chunks one after the other, which may be overwritten later.

        Returns fp32 [prompts that end, hidden], in the order of their chunks; None if none does.
        """
        rows: list[Tensor] = []
        last: list[int] = []  # token row of each result that is one
        at: list[int] = []  # its place among the results
        end = 0
        for chunk in chunks:
            start, end = end, end + chunk.count
            if chunk.pooling is None:
                continue
            if chunk.pooling.params.method == "last":
                if chunk.pooling.ends:
                    at.append(len(rows) + len(at))
                    last.append(end - 1)
                continue
            row = self._accumulate(chunk, hidden[start:end])
            if chunk.pooling.ends:
                rows.append(row)
        return _ordered(rows, last, at, hidden)

    def _accumulate(self, chunk: Chunk, hidden: Tensor) -> Tensor:
        """What the prompt has come to with this chunk, `hidden` [count, hidden]. One that begins anew, as after a
        preemption, begins with nothing."""
        begins = chunk.start == 0
        assert begins or chunk.slot in self._partial, f"the first chunk of slot {chunk.slot} was not pooled"
        assert chunk.pooling is not None
        mean = chunk.pooling.params.method == "mean"
        if not mean:
            row = hidden[0].float().clone() if begins else self._partial[chunk.slot]
        else:
            row = hidden.sum(0, dtype=torch.float32)
            row = row if begins else self._partial[chunk.slot] + row
        if not chunk.pooling.ends:
            self._partial[chunk.slot] = row
            return row
        self.free(chunk.slot)
        return row / (chunk.start + chunk.count) if mean else row


def _ordered(rows: list[Tensor], last: list[int], at: list[int], hidden: Tensor) -> Tensor | None:
    """All results: `rows`, and the token rows `last` in the places `at`."""
    if not rows and not last:
        return None
    taken = iter(hidden[upload(last, hidden.device)].float() if last else ())
    rest, places = iter(rows), set(at)
    return torch.stack([next(taken) if i in places else next(rest) for i in range(len(rows) + len(last))])
