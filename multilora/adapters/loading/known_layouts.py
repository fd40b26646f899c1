"""Adapters that are alike, as those of one recipe are: what config and header say is worked out for the first of them
only; the next ones go from their file to their pages in one order.

To sort and check the 448 tensors of a rank-16 adapter of an 8B model takes Python longer than to read and pack their
84 MB takes eight processes. What alike means is in `peft/stored_layout.py`; that numbers are finite is checked as
ever. It holds for low-rank weights that are packed as they lie in one file, all of it: whatever needs more than that
(DoRA, biases, replaced modules, tables) is worked out each time. Called by `loader.py`.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

import torch

from multilora.adapters.adapter import Adapter, StoredLayout
from multilora.adapters.pack_table import PackTable
from multilora.adapters.packing.pack_jobs import PackJob
from multilora.adapters.packing.placed_jobs import FilePart, FileWeight, PlacedJob, file_parts, pack_table
from multilora.adapters.sources.fingerprint import PART_BYTES
from multilora.lora.panels import AdapterShape

KEPT = 32
"""Layouts; one takes some 100 KB."""
MISS_SECONDS = 60.0


@dataclass(frozen=True)
class KnownLayout:
    """What a fetch finds out about an adapter besides its numbers. num_pages: of all ranks; shares: see
    `packers.Packers.shares`; begin: where the tensors begin in the file; table: how a GPU packs them, if it does;
    staged: the shares for that."""

    shape: AdapterShape
    num_pages: int
    rank: int
    target_modules: list[str]
    invocation_tokens: tuple[int, ...] | None
    shares: list[bytes] = field(default_factory=list)
    begin: int = 0
    table: PackTable | None = None
    staged: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, adapter: Adapter, shape: AdapterShape, num_pages: int) -> "KnownLayout":
        """The layout of a fetched adapter, without shares."""
        return cls(shape, num_pages, adapter.rank, adapter.target_modules, adapter.invocation_tokens)


ShareOut = Callable[[Sequence[FileWeight | FilePart]], list[bytes]]


class KnownLayouts:
    """The layouts that the loader of one engine knows: base model, limits and page size are the same for all.
    Thread-safe."""

    def __init__(self, share_out: ShareOut, on_gpu: torch.dtype | None = None):
        """on_gpu: the dtype of the pages, if a GPU may pack."""
        self._share_out = share_out
        self._on_gpu = on_gpu
        self._known: OrderedDict[str, KnownLayout] = OrderedDict()
        self._missed: dict[str, float] = {}  # key → until when it is not learned again
        self._lock = threading.Lock()

    def get(self, key: str | None) -> KnownLayout | None:
        """The layout of adapters of this key (see `peft/stored_layout.py`); None: it is not known."""
        with self._lock:
            if key is None or key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key]

    def learn(self, layout: KnownLayout, adapter: Adapter, jobs: Sequence[PackJob]) -> None:
        """Keep what a fetch has found out, if that is all there is to know. jobs: all that it has packed."""
        stored = adapter.stored
        weights = _weights(stored, jobs) if stored is not None else None
        shares = self._share_out(weights) if weights is not None else []
        if stored is None or weights is None or not shares:
            return
        begin, end = stored.tensors[0][0], sum(stored.tensors[-1])
        table = pack_table(weights, begin, end, self._on_gpu) if self._on_gpu is not None else None
        staged = self._share_out(file_parts(weights, end, PART_BYTES)) if table is not None else []
        with self._lock:
            if monotonic() < self._missed.get(stored.key, 0.0):
                return
            self._known[stored.key] = replace(layout, shares=shares, begin=begin, table=table, staged=staged)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)

    def forget(self, key: str) -> None:
        """Those that are alike could not be fetched in one order, and for a while this is not tried again: their
        storage may never be in the page cache."""
        now = monotonic()
        with self._lock:
            self._known.pop(key, None)
            self._missed = {k: until for k, until in self._missed.items() if until > now} | {key: now + MISS_SECONDS}


def _weights(stored: StoredLayout, jobs: Sequence[PackJob]) -> list[FileWeight] | None:
    """The tensors of the file and the jobs over each, of which each must have some: others might have a say. None:
    not all of it is packed as it lies in the file."""
    starts = [start for start, _ in stored.tensors]
    begin, end = starts[0], sum(stored.tensors[-1])
    found: dict[int, list[PlacedJob]] = {}
    for job in jobs:
        storage = job.weight.untyped_storage()
        if storage.nbytes() != end - begin or storage.data_ptr() != jobs[0].weight.untyped_storage().data_ptr():
            return None
        at = begin + job.weight.data_ptr() - storage.data_ptr()
        i = bisect_right(starts, at) - 1
        last = sum((n - 1) * step for n, step in zip(job.weight.shape, job.weight.stride(), strict=True))
        if at + (last + 1) * job.weight.itemsize > sum(stored.tensors[i]):
            return None
        found.setdefault(i, []).append(PlacedJob.of(job, at - starts[i]))
    if len(found) != len(starts):
        return None
    return [FileWeight(*stored.tensors[i], placed) for i, placed in sorted(found.items())]
