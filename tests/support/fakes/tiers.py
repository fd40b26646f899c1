"""Adapter tiers without files or a device: a loader that makes adapters up, and a copier that takes its time.

`FakeTiers` puts a real store, host and device tier, page pool and prefix cache over them. The model has one site, and
a page holds A and B of one granule: an adapter of rank 8·k takes k pages. All weights of version v are v.
"""

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
from safetensors.torch import save_file

from multilora.adapters.composition.namespaces import Namespaces
from multilora.adapters.lifecycle.device_tier import DeviceTier
from multilora.adapters.lifecycle.host_tier import HostTier
from multilora.adapters.lifecycle.store import AdapterStore
from multilora.adapters.lifecycle.version import State
from multilora.adapters.loading.loader import Fetched, FetchJob
from multilora.adapters.packing.blocks import PackTarget
from multilora.adapters.peft.base_model import BaseModel
from multilora.engine.scheduling.lora_journal import LoraJournal
from multilora.errors import AdapterIncompatible, AdapterNotFound, MultiloraError
from multilora.lora.panels import AdapterShape, PanelLayout
from multilora.lora.sites import LoraSite, LoraSlice
from multilora.lora.table import LoraTable
from multilora.memory.kv_group import KVGroup
from multilora.memory.page_pool import PagePool
from multilora.memory.prefix_cache import PrefixCache
from multilora.memory.reclaim import GdsfClock, Reclaimer

SITE = LoraSite(index=0, layer=0, name="o_proj", in_features=16, slices=(LoraSlice("o_proj", 0, 16, "self_attn"),))
BASE = BaseModel((SITE,), (), vocab_size=23, hidden_size=16, tie_word_embeddings=False)
PAGE_BYTES = 1024
TARGET = PackTarget((SITE,), torch.float32, PAGE_BYTES)
BEING_COPIED = 0xAA  # what a page holds while an adapter is on its way into it

Delay = Callable[[], int]
Result = tuple[Fetched, torch.Tensor | None]


@dataclass
class FakeFile:
    """What lies at a path. error: fetching it fails with this."""

    rank: int = 8
    fingerprint: str = "as written"
    error: MultiloraError | None = None
    invocation_tokens: tuple[int, ...] | None = None


def write_adapter(path: Path, *, rank: int = 4, layers: int = 1, width: int = 16, seed: int = 0) -> str:
    """Write real files, as PEFT would, for o_proj [width, width] of some layers (of `SITE` by default)."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["o_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=random)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, rank, generator=random)
    save_file(tensors, path / "adapter_model.safetensors")
    return str(path)


class FakeLoader:
    """Knows the adapters in `files`. A job is done `delay()` polls late; others may overtake it."""

    working = False

    def __init__(self, files: dict[str, FakeFile], delay: Delay = lambda: 0):
        self.files = files
        self.delay = delay
        self.submitted: list[FetchJob] = []
        self.closed = False
        self._jobs: list[list] = []  # [polls left, job]

    def submit(self, job: FetchJob) -> None:
        self.submitted.append(job)
        self._jobs.append([self.delay(), job])

    def poll(self) -> list[Result]:
        done = [job for left, job in self._jobs if left <= 0]
        self._jobs = [[left - 1, job] for left, job in self._jobs if left > 0]
        return [self._fetch(job) for job in done]

    def _fetch(self, job: FetchJob) -> Result:
        file = self.files.get(job.path)
        if file is None:
            file = FakeFile(error=AdapterNotFound(f"{job.path}: no such directory"))
        layout = TARGET.layout(shape := AdapterShape(((file.rank,),)))
        error = file.error
        if job.max_bytes is not None and layout.num_pages * PAGE_BYTES > job.max_bytes:
            error = AdapterIncompatible(f"incompatible: {job.path} is over {job.max_bytes} bytes")
        if error is not None:
            return Fetched(version=job.version, kind=error.kind, message=error.message), None
        weights = torch.full((layout.num_pages, PAGE_BYTES // 4), float(job.version))
        fetched = Fetched(
            version=job.version,
            shape=shape,
            rank=file.rank,
            target_modules=["o_proj"],
            fingerprint=file.fingerprint,
            invocation_tokens=file.invocation_tokens,
        )
        return fetched, weights.view(torch.uint8)

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        self.closed = True


class FakeCopy:
    """Done when asked for the `polls + 1`-th time; the bytes arrive then, not before."""

    def __init__(self, arena: torch.Tensor, buffer: torch.Tensor, pages: list[int], polls: int):
        self._arena = arena
        self._buffer = weakref.ref(buffer)
        self._pages = list(pages)
        self._polls = polls
        self._done = False

    def done(self) -> bool:
        if not self._done:
            if self._polls > 0:
                self._polls -= 1
                return False
            buffer = self._buffer()
            assert buffer is not None, "the buffer was freed before its copy was done"
            self._arena[self._pages] = buffer.to(self._arena.device)
            self._done = True
        return True


class FakeCopier:
    """As another stream would: writes to the pages from the first moment on, and is done late."""

    def __init__(self, arena: torch.Tensor, delay: Delay = lambda: 0):
        self.delay = delay
        self.started = 0
        self._arena = arena

    def start_copy(self, buffer: torch.Tensor, pages: list[int], table: None = None) -> FakeCopy:
        self.started += 1
        self._arena[pages] = BEING_COPIED
        return FakeCopy(self._arena, buffer, pages, self.delay())

    def close(self) -> None: ...


class TimedCopier:
    """Copies take `seconds` each by the clock `now`, one after the other: one link."""

    def __init__(self, arena: torch.Tensor, now: Callable[[], float], seconds: float):
        self.started = 0
        self.seconds = seconds
        self._arena = arena
        self._now = now
        self._free_at = 0.0

    def start_copy(self, buffer: torch.Tensor, pages: list[int], table: None = None) -> "TimedCopy":
        self.started += 1
        self._free_at = max(self._free_at, self._now()) + self.seconds
        return TimedCopy(FakeCopy(self._arena, buffer, pages, 0), self._free_at, self._now)

    def close(self) -> None: ...


@dataclass
class TimedCopy:
    copy: FakeCopy
    at: float
    now: Callable[[], float]

    def done(self) -> bool:
        return self.now() >= self.at and self.copy.done()


@dataclass
class _Both:
    """A table as it will be when the next plan is executed, and the journal that the plan takes its changes from."""

    table: LoraTable
    journal: LoraJournal

    def install(self, slot: int, layout: PanelLayout, pages: list[int]) -> None:
        self.table.install(slot, layout, pages)
        self.journal.install(slot, layout, pages)

    def remove(self, slot: int) -> None:
        self.table.remove(slot)
        self.journal.remove(slot)


class FakeTiers:
    """The real tiers over the fakes. Limits as in `Config`, in adapters and in pages."""

    def __init__(
        self,
        files: dict[str, FakeFile],
        *,
        total_pages: int = 16,
        context_pages: int = 2,
        page_size: int = 4,
        max_loras_per_batch: int | None = None,
        max_device_pages: int | None = None,
        max_loaded_loras: int | None = None,
        max_host_pages: int | None = None,
        policy: str = "lru",
        prefix_cache: bool = True,
        groups: tuple[KVGroup, ...] = (KVGroup(),),
        fetch_delay: Delay = lambda: 0,
        copy_delay: Delay = lambda: 0,
        copy_seconds: float | None = None,
        now: Callable[[], float] = monotonic,
    ):
        """copy_delay: in polls; copy_seconds, if given, by the clock `now` instead."""
        self.pool, self.clock = PagePool(total_pages), GdsfClock()
        self.arena = torch.zeros(total_pages, PAGE_BYTES, dtype=torch.uint8)
        self.prefix = PrefixCache(self.pool, self.clock, page_size, enabled=prefix_cache, groups=groups)
        self.namespaces = Namespaces(self.prefix)
        self.table = LoraTable(self.arena, TARGET.dtype, ((0,),))
        self.journal = LoraJournal()
        self.loader = FakeLoader(files, fetch_delay)
        self.copier: FakeCopier | TimedCopier = FakeCopier(self.arena, copy_delay)
        if copy_seconds is not None:
            self.copier = TimedCopier(self.arena, now, copy_seconds)
        self.host = HostTier(max_loaded_loras, None if max_host_pages is None else max_host_pages * PAGE_BYTES)
        self.device = DeviceTier(
            self.pool,
            self.clock,
            _Both(self.table, self.journal),
            self.copier,
            policy=policy,
            max_count=max_loras_per_batch,
            max_pages=max_device_pages,
            on_evict=self.namespaces.demote,
            now=now,
        )
        self.reclaimer = Reclaimer(self.pool, self.clock, [self.prefix, self.device])
        self.store = AdapterStore(
            self.loader,
            self.host,
            self.device,
            self.reclaimer,
            layout_of=TARGET.layout,
            page_bytes=PAGE_BYTES,
            total_pages=total_pages,
            context_pages=context_pages,
        )

    def resident(self) -> list[int]:
        """Versions that requests could run on."""
        return [adapter.version for adapter in self.store.loaded() if adapter.state is State.RESIDENT]

    def acquire(self, version: int) -> int:
        """As a request that starts. Returns its slot."""
        return self.device.acquire_slot(self.store.get(version))

    def release(self, version: int) -> None:
        self.device.release_slot(self.store.get(version))

    def weights_are(self, version: int, slot: int) -> bool:
        """Whether the table's views at `slot` show this version's weights and nothing else."""
        site = self.table.site(slot, SITE.index)
        assert site is not None
        pieces = site.a + site.b[0].pieces
        return all(bool((piece.weight == version).all()) for piece in pieces)

    def check(self) -> None:
        """Raise AssertionError if any book does not balance."""
        self.pool.check()
        self.prefix.check()
        self.store.check()
