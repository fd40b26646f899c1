"""Fetching: from a directory to packed bytes in host memory.

`Loader` is the contract. `InlineLoader` does the work in `poll`, for tests and whatever must be deterministic;
`process.ProcessLoader` does it in another process, away from the step loop.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec
import torch

from multilora.adapters.adapter import Adapter, AdapterLimits
from multilora.adapters.loading.known_layouts import KnownLayout, KnownLayouts
from multilora.adapters.pack_table import PackTable
from multilora.adapters.packing.blocks import Blocks, PackTarget, WriteJobs, pack
from multilora.adapters.packing.cut import cut
from multilora.adapters.packing.pack_jobs import PackJob, write_jobs
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.checkpoint import check_unchanged, read_adapter
from multilora.adapters.peft.safetensors_file import MAX_HEADER_BYTES
from multilora.adapters.peft.stored_layout import read_key
from multilora.adapters.sources import DirectorySource
from multilora.adapters.sources.files import AdapterFiles, find_files, open_regular, read_json
from multilora.adapters.sources.fingerprint import PART_BYTES, combined, fingerprint, identity, part_digest
from multilora.adapters.thread_pool import ALONE, ReaderPool
from multilora.errors import AdapterIncompatible, AdapterInvalid, MultiloraError
from multilora.kernels.integers import cdiv
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
    table: PackTable | None = None  # the buffer holds the bytes of the tensors, and this is how a GPU packs them
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
    """What every fetch of one engine shares. roots: --lora-root; on_gpu: adapters may come as their files have them,
    and the engine's GPU packs them."""

    base: BaseModel
    target: PackTarget
    limits: AdapterLimits
    roots: tuple[str, ...] = ()
    on_gpu: bool = False


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


@dataclass(frozen=True)
class Shortcut:
    """How adapters of a known layout are fetched. load, stage: see `packers.Packers`, into what was allocated last;
    allocate_staged: an `Allocate` in the staging memory, or None where there is no room; later: what is left to do
    once the adapter is handed over."""

    layouts: KnownLayouts
    load: Callable[[Sequence[bytes], torch.dtype, int], bool]
    allocate_staged: Callable[[int, int], torch.Tensor | None]
    stage: Callable[[Sequence[bytes], int, str, torch.dtype, int], list[bytes] | None]
    later: list[Callable[[], None]] = field(default_factory=list)


def read(job: FetchJob, context: FetchContext, readers: ReaderPool = ALONE) -> Adapter:
    """The adapter from its files, checked and with PEFT's rules applied. Raises what `read_adapter` raises."""
    return _read(_directory(job, context), context, readers)


def _directory(job: FetchJob, context: FetchContext) -> Path:
    directory = DirectorySource(context.roots).fetch(job.path)
    _check_file_size(directory, job, context)
    return directory


def _read(directory: Path, context: FetchContext, readers: ReaderPool) -> Adapter:
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
    shortcut: Shortcut | None = None,
) -> tuple[Fetched, torch.Tensor | None]:
    """Read, check and pack one adapter, with `readers` for its files and `write` for its weights. Returns the result
    and the pages of all ranks, uint8 [ranks · pages, page_bytes]; typed errors are part of the result."""
    records: list[SpanRecord] = []
    span = span_below(job.traceparent, "loader.fetch", "loader", records.append)
    result, buffer = _fetch(job, context, allocate, readers, write, shortcut)
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
    shortcut: Shortcut | None,
) -> tuple[Fetched, torch.Tensor | None]:
    try:
        directory = _directory(job, context)
        found = _fetch_known(directory, job, context, allocate, readers, shortcut) if shortcut is not None else None
        if found is not None:
            return found
        adapter = _read(directory, context, readers)
        buffer, shape, jobs = _pack(adapter, job, context, allocate, write)
        layout = KnownLayout.of(adapter, shape, len(buffer))
        if shortcut is not None:
            shortcut.later.append(partial(shortcut.layouts.learn, layout, adapter, jobs))
    except MultiloraError as e:
        return Fetched(version=job.version, kind=e.kind, message=e.message), None
    except (OSError, MemoryError) as e:
        return unavailable(job.version, f"{job.path}: {str(e) or 'out of memory'}"), None
    return _fetched(job, layout, adapter.fingerprint), buffer


def _fetch_known(
    directory: Path,
    job: FetchJob,
    context: FetchContext,
    allocate: "Allocate",
    readers: ReaderPool,
    shortcut: Shortcut,
) -> tuple[Fetched, torch.Tensor] | None:
    """The adapter by the shortcut. None: its layout is not known, or the shortcut cannot be taken."""
    before, files = identity(directory), find_files(directory)
    if files.index is not None:
        return None
    with open_regular(files.weights[0]) as file:
        fields = read_json(files.config)
        key = read_key(fields, file)
        layout = shortcut.layouts.get(key)
        if key is None or layout is None:
            return None
        try:
            _check_room(layout.num_pages * context.target.page_bytes, job)
            buffer = _room_for_file(layout, context, shortcut)
            if buffer is not None:
                found = _stage_known(layout, buffer, file, files, fields, job, context, shortcut)
            else:
                found = _load_known(layout, file, directory, job, context, allocate, readers, shortcut)
        except AdapterInvalid:
            check_unchanged(directory, before)
            raise
    if found is None:
        shortcut.layouts.forget(key)
    else:
        check_unchanged(directory, before)
    return found


def _room_for_file(layout: KnownLayout, context: FetchContext, shortcut: Shortcut) -> torch.Tensor | None:
    """uint8 [pages, page_bytes] in the staging memory. None: no GPU packs the adapter, or there is no room."""
    page_bytes = context.target.page_bytes
    num_pages = cdiv(layout.table.nbytes, page_bytes) if layout.table is not None else 0
    if not 0 < num_pages <= layout.num_pages:  # books count what packed pages take
        return None
    return shortcut.allocate_staged(num_pages, page_bytes)


def _stage_known(
    layout: KnownLayout,
    buffer: torch.Tensor,
    file: BinaryIO,
    files: AdapterFiles,
    config: bytes,
    job: FetchJob,
    context: FetchContext,
    shortcut: Shortcut,
) -> tuple[Fetched, torch.Tensor] | None:
    """The result and the bytes of the tensors, for a GPU to pack, in `buffer`. None: the shortcut cannot be taken."""
    table = layout.table
    assert table is not None
    with _named(job):
        digests = shortcut.stage(layout.staged, layout.begin, table.stored, context.target.dtype, file.fileno())
    if digests is None:
        return None
    of_config = [part_digest(config[at : at + PART_BYTES]) for at in range(0, len(config), PART_BYTES)]
    sizes = [(files.config.name, len(config)), (files.weights[0].name, layout.begin + table.nbytes)]
    return _fetched(job, layout, combined(sizes, of_config + digests), table), buffer


def _load_known(
    layout: KnownLayout,
    file: BinaryIO,
    directory: Path,
    job: FetchJob,
    context: FetchContext,
    allocate: "Allocate",
    readers: ReaderPool,
    shortcut: Shortcut,
) -> tuple[Fetched, torch.Tensor] | None:
    """The result and the pages. None: the shortcut cannot be taken."""
    target = context.target
    with contextlib.ExitStack() as stack:
        digest = readers.start(lambda: fingerprint(directory, readers))
        stack.callback(lambda: digest.cancel() or wait([digest]))
        buffer = allocate(layout.num_pages, target.page_bytes)
        with _named(job):
            done = shortcut.load(layout.shares, target.dtype, file.fileno())
        return (_fetched(job, layout, digest.result()), buffer) if done else None


def _pack(
    adapter: Adapter, job: FetchJob, context: FetchContext, allocate: "Allocate", write: WriteJobs
) -> tuple[torch.Tensor, AdapterShape, list[PackJob]]:
    """The pages of all ranks, the shape, and what `pack` returns."""
    target = context.target
    ranks = [Blocks.of(cut(adapter, context.base.sites, rank, target.ranks)) for rank in range(target.ranks)]
    shape = ranks[0].shape(target.sites)
    layout = target.layout(shape)
    num_pages = target.ranks * layout.num_pages
    _check_room(num_pages * target.page_bytes, job)
    buffer = allocate(num_pages, target.page_bytes)
    with _named(job):
        return buffer, shape, pack(ranks, target, layout, buffer, write)


def _check_room(nbytes: int, job: FetchJob) -> None:
    """Raise AdapterIncompatible for an adapter that takes more bytes than it may."""
    if job.max_bytes is not None and nbytes > job.max_bytes:
        raise AdapterIncompatible(
            f"incompatible: {job.path} takes {nbytes} bytes, over the limit of {job.max_bytes}: the smallest of "
            "the arena, --lora-host-bytes and --lora-device-bytes"
        )


@contextlib.contextmanager
def _named(job: FetchJob) -> Iterator[None]:
    """What packing finds wrong says of which adapter it is."""
    try:
        yield
    except AdapterInvalid as e:
        raise AdapterInvalid(f"{job.path}: {e.message}") from None


def _fetched(job: FetchJob, layout: KnownLayout, mark: str, table: PackTable | None = None) -> Fetched:
    return Fetched(
        version=job.version,
        shape=layout.shape,
        rank=layout.rank,
        target_modules=layout.target_modules,
        fingerprint=mark,
        invocation_tokens=layout.invocation_tokens,
        table=table,
    )


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
