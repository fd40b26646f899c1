"""Adapters that are alike, as those of one recipe are: what config and header say is worked out for the first of them
only; the next ones go from their file to their pages in one order.

To sort and check the 448 tensors of a rank-16 adapter of an 8B model takes Python longer than to read and pack their
84 MB takes eight processes. Alike means: the same bytes in the config, the same header, a file of the same size; then
nothing but the numbers differs, and those are checked as ever. What is written is low-rank weights as they lie in one
file: whatever needs more than that (DoRA, biases, replaced modules, tables) is worked out each time. Called by
`loader.py`.
"""

import hashlib
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch

from multilora.adapters.adapter import Adapter, LowRank
from multilora.adapters.pack_table import PackTable
from multilora.adapters.packing.pack_jobs import PackJob
from multilora.adapters.packing.placed_jobs import FileWeight, PlacedJob, pack_table
from multilora.adapters.peft.safetensors_file import KNOWN_HEADER_BYTES, SafetensorsFile
from multilora.adapters.sources.files import MAX_CONFIG_BYTES, AdapterFiles, open_regular
from multilora.lora.panels import AdapterShape

KEPT = 32
"""Layouts; one takes some 100 KB."""


@dataclass(frozen=True)
class KnownLayout:
    """What a fetch finds out about an adapter besides its numbers. num_pages: of all ranks; shares: see
    `packers.Packers.shares`; begin: the first byte of the tensors in the file; table: how a GPU packs them, if it
    does."""

    shape: AdapterShape
    num_pages: int
    rank: int
    target_modules: list[str]
    invocation_tokens: tuple[int, ...] | None
    shares: list[bytes] = field(default_factory=list)
    begin: int = 0
    table: PackTable | None = None

    @classmethod
    def of(cls, adapter: Adapter, shape: AdapterShape, num_pages: int) -> "KnownLayout":
        """The layout of a fetched adapter, without shares."""
        return cls(shape, num_pages, adapter.rank, adapter.target_modules, adapter.invocation_tokens)


ShareOut = Callable[[Sequence[FileWeight]], list[bytes]]


class KnownLayouts:
    """The layouts that the loader of one engine knows: base model, limits and page size are the same for all.
    Thread-safe."""

    def __init__(self, share_out: ShareOut, on_gpu: torch.dtype | None = None):
        """on_gpu: the dtype of the pages, if a GPU may pack."""
        self._share_out = share_out
        self._on_gpu = on_gpu
        self._known: OrderedDict[str, KnownLayout] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str | None) -> KnownLayout | None:
        """The layout of adapters for which `alike` gives this key; None: it is not known."""
        with self._lock:
            if key is None or key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key]

    def learn(self, key: str, layout: KnownLayout, path: Path, adapter: Adapter, jobs: Sequence[PackJob]) -> None:
        """Keep what a fetch has found out, if that is all there is to know. jobs: all that it has packed, over
        memory that holds the numbers of the file `path`."""
        if not all(isinstance(block, LowRank) for block in adapter.blocks):
            return
        begin, end = tensor_bytes(path)
        weights = _weights(path, jobs, begin, end)
        shares = self._share_out(weights) if weights is not None else []
        if not shares or weights is None:
            return
        table = pack_table(weights, begin, end, self._on_gpu) if self._on_gpu is not None else None
        with self._lock:
            self._known[key] = replace(layout, shares=shares, begin=begin, table=table)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)


def alike(files: AdapterFiles, weights: BinaryIO) -> str | None:
    """What adapters that are alike have in common, from their config and the header of their one file, open at its
    beginning. None: they are in shards, or too long to be known."""
    if len(files.weights) != 1 or files.index is not None:
        return None
    size = os.fstat(weights.fileno()).st_size
    length = weights.read(8)
    header = int.from_bytes(length, "little")
    with open_regular(files.config) as config:
        fields = config.read(MAX_CONFIG_BYTES + 1)
    if header > KNOWN_HEADER_BYTES or len(fields) > MAX_CONFIG_BYTES:
        return None
    digest = hashlib.sha256(f"{size} {len(fields)} ".encode())
    for part in (length, fields, weights.read(header)):
        digest.update(part)
    return digest.hexdigest()


def tensor_bytes(path: Path) -> tuple[int, int]:
    """Where the tensors of a safetensors file begin and end."""
    with open_regular(path) as file:
        return 8 + int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size


def _weights(path: Path, jobs: Sequence[PackJob], begin: int, end: int) -> list[FileWeight] | None:
    """The tensors of the file and the jobs over each. None: some job's numbers are not as they lie in the file."""
    with SafetensorsFile(path) as file:
        tensors = sorted(file.tensors.values(), key=lambda info: info.start)
    starts = [info.start for info in tensors]
    found: dict[int, list[PlacedJob]] = {}
    for job in jobs:
        storage = job.weight.untyped_storage()
        if storage.nbytes() != end - begin or storage.data_ptr() != jobs[0].weight.untyped_storage().data_ptr():
            return None
        at = begin + job.weight.data_ptr() - storage.data_ptr()
        i = bisect_right(starts, at) - 1
        last = sum((n - 1) * step for n, step in zip(job.weight.shape, job.weight.stride(), strict=True))
        if at + (last + 1) * job.weight.itemsize > starts[i] + tensors[i].nbytes:
            return None
        found.setdefault(i, []).append(PlacedJob.of(job, at - starts[i]))
    return [FileWeight(starts[i], tensors[i].nbytes, placed) for i, placed in sorted(found.items())]
