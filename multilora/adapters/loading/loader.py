"""Fetching: from a path or hub id to packed bytes in host memory, away from the step loop.

`Loader` is the contract. `InlineLoader` does the work in `poll`, for tests and anything that must be deterministic;
`process.ProcessLoader` does it in another process.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from multilora.adapters.adapter import Adapter, AdapterLimits
from multilora.adapters.packing.blocks import Blocks, PackTarget, WriteJobs, pack
from multilora.adapters.packing.pack_jobs import write_jobs
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.checkpoint import read_adapter
from multilora.adapters.peft.safetensors_file import MAX_HEADER_BYTES
from multilora.adapters.sources import resolve
from multilora.adapters.sources.files import find_files
from multilora.adapters.thread_pool import ALONE, ReaderPool
from multilora.errors import AdapterIncompatible, AdapterInvalid, MultiloraError
from multilora.lora.panels import AdapterShape


class FetchJob(msgspec.Struct, frozen=True):
    """Bring in one adapter version. max_bytes: refuse it if its packed size is over this."""

    version: int
    path: str
    max_bytes: int | None = None


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """What a fetch found out. `kind` and `message` name the error if there was one; then the rest is empty."""

    version: int
    shape: AdapterShape | None = None
    rank: int = 0
    target_modules: list[str] = []
    fingerprint: str = ""
    invocation_tokens: tuple[int, ...] | None = None  # see Adapter
    kind: str = ""
    message: str = ""


@dataclass(frozen=True)
class FetchContext:
    """What every fetch of one engine shares."""

    base: BaseModel
    target: PackTarget
    limits: AdapterLimits
    roots: tuple[str, ...] = ()


class Loader(Protocol):
    @property
    def working(self) -> bool:
        """`poll` itself has work to do: call it again soon."""
        ...

    def submit(self, job: FetchJob) -> None: ...

    def poll(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        """Finished jobs, in any order; the buffer is uint8 [pages, page_bytes] (None on error). Never blocks long."""
        ...

    def fileno(self) -> int | None:
        """Readable when `poll` has something; None if polling is all there is."""
        ...

    def close(self) -> None: ...


def read(job: FetchJob, context: FetchContext, readers: ReaderPool = ALONE) -> Adapter:
    """The files, checked and with PEFT's rules applied."""
    directory = resolve(job.path, context.roots)
    _check_file_size(directory, job, context)
    adapter = read_adapter(directory, context.base, context.limits, readers)
    if not adapter.blocks:
        raise AdapterInvalid(f"{directory}: no LoRA weights")
    return adapter


def _check_file_size(directory: Path, job: FetchJob, context: FetchContext) -> None:
    """Refuse a file that is too large whatever is in it, before its size is asked of the system's memory.

    Of a file's numbers, in fp32 at most, all are packed but for copies of the base model's two tables.
    """
    if job.max_bytes is None:
        return
    base, itemsize = context.base, context.target.dtype.itemsize
    numbers = job.max_bytes // itemsize + 2 * base.vocab_size * base.hidden_size
    limit = 4 * numbers + MAX_HEADER_BYTES
    size = sum(file.stat().st_size for file in find_files(directory).weights)
    if size > limit:
        raise AdapterIncompatible(f"incompatible: the weights of {job.path} have {size} bytes, over {limit}")


def fetch(
    job: FetchJob,
    context: FetchContext,
    allocate: "Allocate",
    readers: ReaderPool = ALONE,
    write: WriteJobs = write_jobs,
) -> tuple[Fetched, torch.Tensor | None]:
    """Read, check and pack one adapter. crew: reads; write: packs. Typed errors become part of the result."""
    target = context.target
    try:
        adapter = read(job, context, readers)
        blocks = Blocks.of(adapter)
        shape = blocks.shape(target.sites)
        layout = target.layout(shape)
        nbytes = layout.num_pages * target.page_bytes
        if job.max_bytes is not None and nbytes > job.max_bytes:
            raise AdapterIncompatible(
                f"incompatible: {job.path} takes {nbytes} bytes, over the limit of {job.max_bytes}: the smallest of "
                "the arena, --lora-host-bytes and --lora-device-bytes"
            )
        buffer = allocate(layout.num_pages, target.page_bytes)
        try:
            pack(blocks, target, layout, buffer, write)
        except AdapterInvalid as e:
            raise AdapterInvalid(f"{job.path}: {e.message}") from None
    except MultiloraError as e:
        return Fetched(version=job.version, kind=e.kind, message=e.message), None
    except (OSError, MemoryError) as e:
        return Fetched(
            version=job.version, kind="AdapterError", message=f"{job.path}: {str(e) or 'out of memory'}"
        ), None
    result = Fetched(
        version=job.version,
        shape=shape,
        rank=adapter.rank,
        target_modules=adapter.target_modules,
        fingerprint=adapter.fingerprint,
        invocation_tokens=adapter.invocation_tokens,
    )
    return result, buffer


class Allocate(Protocol):
    def __call__(self, num_pages: int, page_bytes: int) -> torch.Tensor:
        """A zeroed uint8 [num_pages, page_bytes]."""
        ...


def allocate_private(num_pages: int, page_bytes: int) -> torch.Tensor:
    return torch.zeros(num_pages, page_bytes, dtype=torch.uint8)


class InlineLoader:
    """Does each job in `poll`, in order, at most `per_poll` of them."""

    working = False

    def __init__(self, context: FetchContext, per_poll: int | None = None):
        self._context = context
        self._per_poll = per_poll
        self._jobs: deque[FetchJob] = deque()

    def submit(self, job: FetchJob) -> None:
        self._jobs.append(job)

    def poll(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        done: list[tuple[Fetched, torch.Tensor | None]] = []
        while self._jobs and (self._per_poll is None or len(done) < self._per_poll):
            done.append(fetch(self._jobs.popleft(), self._context, allocate_private))
        return done

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        self._jobs.clear()
