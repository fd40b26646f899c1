"""Fetching: from a directory to packed bytes in host memory.

`Loader` is the contract. `InlineLoader` does the work in `poll`, for tests and whatever must be deterministic;
`process.ProcessLoader` does it in another process, away from the step loop.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from multilora.adapters.adapter import Adapter, AdapterLimits
from multilora.adapters.packing.blocks import Blocks, PackTarget, WriteJobs, pack
from multilora.adapters.packing.cut import cut
from multilora.adapters.packing.pack_jobs import write_jobs
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.checkpoint import read_adapter
from multilora.adapters.peft.safetensors_file import MAX_HEADER_BYTES
from multilora.adapters.sources import DirectorySource
from multilora.adapters.sources.files import find_files
from multilora.adapters.thread_pool import ALONE, ReaderPool
from multilora.errors import AdapterIncompatible, AdapterInvalid, MultiloraError
from multilora.lora.panels import AdapterShape
from multilora.tracing import SpanRecord, span_below


class FetchJob(msgspec.Struct, frozen=True):
    """Fetch one adapter version. max_bytes: refuse it if its packed size, of all ranks, is larger."""

    version: int
    path: str
    max_bytes: int | None = None
    traceparent: str | None = None


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a fetch. `kind` and `message` describe the error if there was one; then the rest is empty."""

    version: int
    shape: AdapterShape | None = None
    rank: int = 0
    target_modules: list[str] = []
    fingerprint: str = ""
    invocation_tokens: tuple[int, ...] | None = None  # see `Adapter`
    kind: str = ""
    message: str = ""
    span: SpanRecord | None = None  # of the fetch, if the job has a traceparent


def failed(version: int, message: str) -> Fetched:
    """The result of a fetch that failed and would fail again."""
    return Fetched(version=version, kind="AdapterError", message=message)


def unavailable(version: int, message: str) -> Fetched:
    """The result of a fetch that failed for a reason outside the adapter, so that it may go well later."""
    return Fetched(version=version, kind="AdapterUnavailable", message=message)


@dataclass(frozen=True)
class FetchContext:
    """What every fetch of one engine shares. roots: --lora-root."""

    base: BaseModel
    target: PackTarget
    limits: AdapterLimits
    roots: tuple[str, ...] = ()


class Loader(Protocol):
    """Fetches adapters; used by one thread."""

    @property
    def working(self) -> bool:
        """Whether `poll` itself has work to do, so that it should be called again soon."""
        ...

    def submit(self, job: FetchJob) -> None:
        """Start a job. Its result comes from a later `poll`, errors included."""

    def poll(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        """Finished jobs, in any order; the buffer is uint8 [ranks · pages, page_bytes] (None on error). Never blocks
        long."""
        ...

    def fileno(self) -> int | None:
        """A descriptor that is readable when `poll` has something; None if there is none, so that one must poll."""
        ...

    def close(self) -> None:
        """Drop all jobs and free what the loader owns. Buffers that it has returned stay valid."""


def read(job: FetchJob, context: FetchContext, readers: ReaderPool = ALONE) -> Adapter:
    """The adapter from its files, checked and with PEFT's rules applied. Raises what `read_adapter` raises."""
    directory = DirectorySource(context.roots).fetch(job.path)
    _check_file_size(directory, job, context)
    adapter = read_adapter(directory, context.base, context.limits, readers)
    if not adapter.blocks:
        raise AdapterInvalid(f"{directory}: no LoRA weights")
    return adapter


def _check_file_size(directory: Path, job: FetchJob, context: FetchContext) -> None:
    """Refuse files that are too large whatever they hold, before memory of their size is allocated.

    All numbers of a file, in fp32 at most, are packed, except copies of the base model's two tables.
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
    """Read, check and pack one adapter, with `readers` for its files and `write` for its weights. Returns the result
    and the pages of all ranks, uint8 [ranks · pages, page_bytes]; typed errors are part of the result."""
    records: list[SpanRecord] = []
    span = span_below(job.traceparent, "loader.fetch", "loader", records.append)
    result, buffer = _fetch(job, context, allocate, readers, write)
    if span is None:
        return result, buffer
    span.attributes["multilora.adapter.version"] = job.version
    span.attributes["multilora.adapter.rank"] = result.rank
    span.attributes["multilora.adapter.bytes"] = 0 if buffer is None else buffer.numel()
    span.end(f"{result.kind}: {result.message}"[:1000] if result.kind else "")
    return msgspec.structs.replace(result, span=records[0]), buffer


def _fetch(
    job: FetchJob,
    context: FetchContext,
    allocate: "Allocate",
    readers: ReaderPool,
    write: WriteJobs,
) -> tuple[Fetched, torch.Tensor | None]:
    target = context.target
    try:
        adapter = read(job, context, readers)
        ranks = [Blocks.of(cut(adapter, context.base.sites, rank, target.ranks)) for rank in range(target.ranks)]
        shape = ranks[0].shape(target.sites)
        layout = target.layout(shape)
        num_pages = target.ranks * layout.num_pages
        nbytes = num_pages * target.page_bytes
        if job.max_bytes is not None and nbytes > job.max_bytes:
            raise AdapterIncompatible(
                f"incompatible: {job.path} takes {nbytes} bytes, over the limit of {job.max_bytes}: the smallest of "
                "the arena, --lora-host-bytes and --lora-device-bytes"
            )
        buffer = allocate(num_pages, target.page_bytes)
        try:
            pack(ranks, target, layout, buffer, write)
        except AdapterInvalid as e:
            raise AdapterInvalid(f"{job.path}: {e.message}") from None
    except MultiloraError as e:
        return Fetched(version=job.version, kind=e.kind, message=e.message), None
    except (OSError, MemoryError) as e:
        return unavailable(job.version, f"{job.path}: {str(e) or 'out of memory'}"), None
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
    """Where the pages of an adapter go."""

    def __call__(self, num_pages: int, page_bytes: int) -> torch.Tensor:
        """uint8 [num_pages, page_bytes], all zero."""
        ...


def allocate_private(num_pages: int, page_bytes: int) -> torch.Tensor:
    """An `Allocate` in this process' own memory."""
    return torch.zeros(num_pages, page_bytes, dtype=torch.uint8)


class InlineLoader:
    """The contract of `Loader`: does the jobs inside `poll`, in order, at most `per_poll` at a time."""

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
