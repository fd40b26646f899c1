"""Adapters that are alike: fetched in one order, and what comes is what a fetch from scratch has found.

Covers `loading/packing_process.py` and `peft/stored_layout.py` too.
"""

import json
import mmap
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fakes.tiers import write_adapter
from pack_tables import apply
from safetensors.torch import load_file, save_file

from multilora.adapters.adapter import AdapterLimits, Full, LowRank
from multilora.adapters.host.shared_buffers import SharedBuffer, SharedBuffers
from multilora.adapters.loading import known_layouts, loader, packing_process
from multilora.adapters.loading.known_layouts import KnownLayouts
from multilora.adapters.loading.loader import FetchContext, Fetched, FetchJob, Shortcut, allocate_private, fetch
from multilora.adapters.loading.packers import Packers
from multilora.adapters.packing.blocks import PackTarget
from multilora.adapters.packing.pack_jobs import PackJob
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.safetensors_file import SafetensorsFile
from multilora.adapters.peft.stored_layout import stored_layout
from multilora.adapters.sources import fingerprint
from multilora.adapters.sources.files import WEIGHTS_NAME
from multilora.adapters.thread_pool import ReaderPool
from multilora.errors import AdapterInvalid
from multilora.lora.sites import LoraSite, LoraSlice

# on Python 3.12 and later; the loader itself forks before it has threads
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

LAYERS, WIDTH, PAGE = 3, 64, 4096
SITES = tuple(LoraSite(i, i, "o_proj", WIDTH, (LoraSlice("o_proj", 0, WIDTH, "self_attn"),)) for i in range(LAYERS))
BASE = BaseModel(SITES, (), vocab_size=23, hidden_size=WIDTH, tie_word_embeddings=False)
STAGING = 64 * PAGE
STORED = [*product((torch.bfloat16, torch.float16, torch.float32), (torch.bfloat16, torch.float32), (1, 2))]
IN_ORDER = [pytest.param(*one, marks=() if i in (0, 5, 11) else pytest.mark.slow) for i, one in enumerate(STORED)]


@dataclass
class Loading:
    """What the loader process has, in this one."""

    ranks: int = 1
    dtype: torch.dtype = torch.float32
    on_gpu: bool = False
    staging: mmap.mmap | None = None
    packers: Packers = field(init=False)

    def __post_init__(self) -> None:
        self.packers = Packers(3, staging=self.staging, region_bytes=1 << 20)
        self.buffers = SharedBuffers(self.staging)
        self.layouts = KnownLayouts(self.packers.shares, self.dtype if self.on_gpu else None)
        self.context = FetchContext(BASE, PackTarget.of(SITES, self.dtype, PAGE, self.ranks), AdapterLimits())
        self._readers = ReaderPool(2, self.packers.memory, self.packers.read)

    def fetch(self, path: str, **job: Any) -> tuple[Fetched, torch.Tensor | None]:
        """As `process._FetchServer` does."""
        taken: list[SharedBuffer] = []

        def allocate(num_pages: int, page_bytes: int) -> torch.Tensor:
            while taken:
                self.buffers.drop(taken.pop())
            taken.append(self.buffers.take(num_pages * page_bytes))
            return taken[0].tensor().view(num_pages, page_bytes)

        def allocate_staged(num_pages: int, page_bytes: int) -> torch.Tensor | None:
            taken.extend(part for part in (self.buffers.take_staged(num_pages * page_bytes),) if part is not None)
            return taken[0].tensor().view(num_pages, page_bytes) if taken else None

        def load(shares: Sequence[bytes], dtype: torch.dtype, fd: int) -> bool:
            return self.packers.load(shares, dtype, fd, taken[0])

        def stage(
            shares: Sequence[bytes], begin: int, stored: str, dtype: torch.dtype, fd: int
        ) -> list[bytes] | None:
            return self.packers.stage(shares, begin, stored, dtype, fd, taken[0])

        shortcut = Shortcut(self.layouts, load, allocate_staged, stage)
        result, pages = fetch(
            FetchJob(1, path, **job),
            self.context,
            allocate,
            self._readers,
            lambda jobs, dtype, out: self.packers.write(jobs, dtype, out, taken[0]),
            shortcut,
        )
        for work in shortcut.later:
            work()
        found = None if pages is None else pages.clone()
        for buffer in taken:
            self.buffers.drop(buffer)
        return result, found

    def expect(self, path: str) -> None:
        """The same as from scratch, in one process."""
        result, pages = self.fetch(path)
        expected, expected_pages = fetch(FetchJob(1, path), self.context, allocate_private)
        assert result == expected and result.kind == ""
        assert torch.equal(pages, expected_pages)

    def all_is_free(self) -> bool:
        self.buffers._zeroing.submit(lambda: None).result()
        return self.staging is None or self.buffers._parts.take(STAGING) == 0


def no_reading(*_: Any) -> Any:
    raise AssertionError("nothing may be worked out again")


@pytest.fixture(params=["files", "staging"])
def staging(request: pytest.FixtureRequest) -> mmap.mmap | None:
    return mmap.mmap(-1, STAGING) if request.param == "staging" else None


@pytest.fixture
def loading(staging: mmap.mmap | None) -> Iterator[Loading]:
    made = Loading(staging=staging)
    yield made
    made.packers.close()


def stored_as(path: str, dtype: torch.dtype) -> str:
    file = Path(path) / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    return path


@pytest.mark.parametrize(("stored", "dtype", "ranks"), IN_ORDER)
def test_the_second_comes_in_one_order(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds is its own, and so is its mark; only what config and header say is not read again."""
    loading = Loading(ranks, dtype, staging=mmap.mmap(-1, STAGING))
    paths = [
        stored_as(write_adapter(tmp_path / str(i), rank=20, layers=LAYERS, width=WIDTH, seed=i), stored)
        for i in range(3)
    ]
    try:
        marks = [loading.fetch(paths[0])[0].fingerprint]
        expected = [fetch(FetchJob(1, path), loading.context, allocate_private) for path in paths]
        monkeypatch.setattr(loader, "read_adapter", no_reading)
        for path, (result, pages) in zip(paths[1:], expected[1:], strict=True):
            found, found_pages = loading.fetch(path)
            assert found == result and torch.equal(found_pages, pages)
            marks.append(found.fingerprint)
        assert len(set(marks)) == 3
        assert loading.all_is_free()
    finally:
        loading.packers.close()


def test_numbers_are_checked_all_the_same(loading: Loading, tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", layers=LAYERS, width=WIDTH)
    bad = write_adapter(tmp_path / "bad", layers=LAYERS, width=WIDTH, seed=1)
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.2.self_attn.o_proj.lora_B.weight"][5, 1] = torch.inf
    save_file(tensors, file)
    loading.expect(good)
    result, pages = loading.fetch(bad)
    assert pages is None and result.kind == "AdapterInvalid"
    assert result.message == f"{bad}: layer 2 o_proj lora_B: a weight is not finite in torch.float32"
    loading.expect(good)
    assert loading.all_is_free()


def test_limits_of_bytes_hold(loading: Loading, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", rank=16, layers=LAYERS, width=WIDTH)
    for _ in range(2):
        pages = loading.fetch(path)[1]
        refused = loading.fetch(path, max_bytes=pages.numel() - 1)[0]
        assert refused.kind == "AdapterIncompatible" and "--lora-host-bytes" in refused.message


def test_another_config_is_another_layout(loading: Loading, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH)
    loading.expect(path)
    config = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(config.read_text())
    for change in ({"lora_alpha": 8}, {"use_rslora": True}, {"alpha_pattern": {"o_proj": 3}}):
        config.write_text(json.dumps(fields | change))
        loading.expect(path)
    config.write_text(json.dumps(fields | {"use_dora": True}))
    assert loading.fetch(path)[0].kind == "AdapterInvalid", "it has no magnitudes"


def test_what_is_not_in_the_page_cache_is_read_the_long_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two weights of each share were; nothing that was written for nothing is left."""
    read = packing_process.read_cached
    monkeypatch.setattr(packing_process, "read_cached", lambda fd, at, to: at < 3000 and read(fd, at, to))
    loading = Loading(staging=mmap.mmap(-1, STAGING))
    try:
        for seed in range(3):
            loading.expect(write_adapter(tmp_path / str(seed), layers=LAYERS, width=WIDTH, seed=seed))
        assert not loading.layouts._known, "which is not tried again for a while"
        assert loading.all_is_free()
    finally:
        loading.packers.close()


def test_when_a_process_dies_the_adapter_is_fetched_all_the_same(loading: Loading, tmp_path: Path, caplog) -> None:
    paths = [write_adapter(tmp_path / str(i), layers=LAYERS, width=WIDTH, seed=i) for i in range(3)]
    loading.expect(paths[0])
    os.kill(loading.packers._packers[1].pid, signal.SIGKILL)
    for path in paths:
        loading.expect(path)
    assert "a packing process has died" in caplog.text
    assert loading.all_is_free()


def test_files_that_change_meanwhile_are_noticed(
    loading: Loading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH)
    loading.expect(path)
    load = loading.packers.load

    def changing(*args: Any) -> bool:
        write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH, seed=1)
        return load(*args)

    monkeypatch.setattr(loading.packers, "load", changing)
    result, pages = loading.fetch(path)
    assert pages is None and result.kind == "AdapterInvalid" and "changed while they were read" in result.message
    assert loading.all_is_free()


def test_what_is_learned_is_of_the_bytes_that_were_read(
    loading: Loading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a trainer writes the next adapter: before this one is read, or once it has been answered."""
    path, other = tmp_path / "a", tmp_path / "other"
    write_adapter(path, rank=8, layers=LAYERS, width=WIDTH)
    read, learn = loader.read_adapter, loading.layouts.learn

    def replaced(*args: Any) -> Any:
        write_adapter(path, rank=16, layers=LAYERS, width=WIDTH)
        return read(*args)

    def learn_late(*args: Any) -> None:
        write_adapter(path, rank=12, layers=LAYERS, width=WIDTH)
        learn(*args)

    monkeypatch.setattr(loader, "read_adapter", replaced)
    monkeypatch.setattr(loading.layouts, "learn", learn_late)
    assert loading.fetch(str(path))[0].rank == 16
    monkeypatch.undo()
    assert len(loading.layouts._known) == 1
    for rank in (8, 12, 16):
        loading.expect(write_adapter(other, rank=rank, layers=LAYERS, width=WIDTH, seed=rank))


def test_a_directory_that_goes_once_it_has_been_read(
    loading: Loading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pack = write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH), loader.pack

    def gone(*args: Any) -> Any:
        shutil.rmtree(path)
        return pack(*args)

    monkeypatch.setattr(loader, "pack", gone)
    assert loading.fetch(path)[0].kind == ""


def test_numbers_that_change_meanwhile_are_not_the_adapters_fault(
    loading: Loading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH)
    loading.expect(path)

    def half_written(*_: Any) -> bool:
        write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH, seed=1)
        raise AdapterInvalid("layer 0 o_proj lora_A: a weight is not finite")

    monkeypatch.setattr(loading.packers, "load", half_written)
    assert "changed while they were read" in loading.fetch(path)[0].message


def test_numbers_may_have_a_say_in_tables_and_in_tensors_that_are_not_used(tmp_path: Path) -> None:
    a, b = torch.ones(4, WIDTH), torch.ones(WIDTH, 4)
    with SafetensorsFile(Path(write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH)) / WEIGHTS_NAME) as file:
        for block, known in (
            (LowRank(0, "o_proj", a, b, 1.0), True),
            (LowRank(-1, "lm_head", a, b, 1.0), False),
            (LowRank(-1, "embed_tokens", a, b, 1.0), False),
            (Full(-1, "norm", torch.ones(WIDTH)), False),
        ):
            assert (stored_layout(b"{}", [file], [block]) is not None) is known
        assert stored_layout(b"{}", [file, file], []) is None
        stored = stored_layout(b"{}", [file], [])
    assert stored is not None
    data = torch.zeros(sum(stored.tensors[-1]) - stored.tensors[0][0], dtype=torch.uint8)
    jobs, at = [], 0
    for _, nbytes in stored.tensors:
        jobs.append(PackJob("x", data[at : at + nbytes].view(torch.float32).view(4, -1), 1.0, ()))
        at += nbytes
    assert known_layouts._weights(stored, jobs) is not None
    assert known_layouts._weights(stored, jobs[:-1]) is None
    jobs[1] = PackJob("x", jobs[1].weight.clone(), 1.0, ())
    assert known_layouts._weights(stored, jobs) is None


@pytest.mark.parametrize("part_bytes", [fingerprint.PART_BYTES, 1000])
@pytest.mark.parametrize("rank", [8, 12])
def test_what_a_gpu_packs_comes_as_the_file_has_it(
    tmp_path: Path, rank: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the table that makes the same pages of it; checked, and in the staging memory, else packed."""
    for module in (fingerprint, known_layouts, loader):
        monkeypatch.setattr(module, "PART_BYTES", part_bytes)
    loading = Loading(dtype=torch.bfloat16, on_gpu=True, staging=mmap.mmap(-1, STAGING))
    paths = [
        stored_as(write_adapter(tmp_path / str(i), rank=rank, layers=LAYERS, width=WIDTH, seed=i), torch.bfloat16)
        for i in range(3)
    ]
    try:
        loading.expect(paths[0])
        expected, expected_pages = fetch(FetchJob(1, paths[1]), loading.context, allocate_private)
        result, raw = loading.fetch(paths[1])
        assert raw.numel() <= expected_pages.numel(), "books count what packed pages take"
        assert result.table is not None and msgspec.structs.replace(result, table=None) == expected
        pages = torch.zeros_like(expected_pages)
        apply(result.table, raw.view(torch.bfloat16).view(-1), pages)
        assert torch.equal(pages, expected_pages)
        loading.buffers._zeroing.submit(lambda: None).result()
        held = loading.buffers.take(STAGING)
        assert held.fd is None
        loading.expect(paths[1])
        loading.buffers.drop(held)
        file = Path(paths[2]) / WEIGHTS_NAME
        tensors = load_file(file)
        tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"][2, 3] = -torch.inf
        save_file(tensors, file)
        assert "layer 1 o_proj lora_A: a weight is not finite" in loading.fetch(paths[2])[0].message
        loading.expect(stored_as(paths[0], torch.float32))
        loading.expect(paths[0])  # of another length than packed numbers: the CPU packs it
        assert loading.all_is_free()
    finally:
        loading.packers.close()


def test_what_is_more_than_low_rank_is_worked_out_each_time(loading: Loading, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH)
    file, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    fields, tensors = json.loads(config.read_text()), load_file(file)
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    config.write_text(json.dumps(fields | {"bias": "lora_only", "lora_bias": True}))
    biases = {f"base_model.model.model.layers.{i}.self_attn.o_proj.lora_B.bias": torch.ones(WIDTH) for i in range(3)}
    save_file(tensors | biases, file)
    assert loading.fetch(path)[0].kind == ""
    config.write_text(json.dumps(fields))
    save_file({n: t.double() if n.startswith(name) else t for n, t in tensors.items()}, file)
    assert loading.fetch(path)[0].kind == "AdapterUnsupported"
    assert not loading.layouts._known


def test_so_many_are_kept(loading: Loading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_layouts, "KEPT", 2)
    paths = [write_adapter(tmp_path / str(r), rank=r, layers=LAYERS, width=WIDTH) for r in (1, 2, 3)]
    for path in (*paths[:2], paths[0], paths[2]):
        loading.expect(path)
    monkeypatch.setattr(loader, "read_adapter", no_reading)
    assert loading.fetch(paths[0])[0].kind == "", "it was used last but one"
    with pytest.raises(AssertionError):
        loading.fetch(paths[1])


@pytest.mark.parametrize("start", [b"version ", b"\x80\x04\x95....", b"\xff" * 8, (1 << 41).to_bytes(8, "little")])
def test_what_is_no_such_file_is_named_as_ever(loading: Loading, tmp_path: Path, start: bytes) -> None:
    """And nothing of the size that it seems to declare is read."""
    path = write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH)
    loading.expect(path)
    (tmp_path / "a" / WEIGHTS_NAME).write_bytes(start + b"https://git-lfs")
    result, _ = loading.fetch(path)
    assert result.kind == "AdapterInvalid" and "not a safetensors file" in result.message


def test_without_processes_nothing_is_kept(tmp_path: Path) -> None:
    layouts = KnownLayouts(Packers(0).shares)
    later = Shortcut(layouts, no_reading, no_reading, no_reading)
    path = write_adapter(tmp_path / "a", layers=LAYERS, width=WIDTH)
    context = FetchContext(BASE, PackTarget.of(SITES, torch.float32, PAGE, 1), AdapterLimits())
    assert fetch(FetchJob(1, path), context, allocate_private, shortcut=later)[0].kind == ""
    for work in later.later:
        work()
    assert not layouts._known
