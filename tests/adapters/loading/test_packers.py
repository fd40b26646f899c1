"""Processes that pack: the same bytes as in one process, errors by name, and nothing lost when one of them dies.

Covers `packing/pack_jobs.py` too.
"""

import gc
import mmap
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from multilora.adapters.adapter import Adapter, LowRank
from multilora.adapters.host.shared_buffers import SharedBuffers
from multilora.adapters.loading import packers as module
from multilora.adapters.loading.packers import Packers, Region
from multilora.adapters.loading.packing_process import read_cached
from multilora.adapters.packing.blocks import Blocks, PackTarget, pack
from multilora.adapters.packing.pack_jobs import PackJob
from multilora.errors import AdapterInvalid
from multilora.lora.sites import LoraSite, LoraSlice

# on Python 3.12 and later; the loader itself forks before it has threads
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SITES = tuple(
    LoraSite(i, i, "o_proj", width, (LoraSlice("o_proj", 0, out),))
    for i, (width, out) in enumerate([(128, 384), (256, 128), (64, 48), (384, 256), (100, 640)])
)
PAGE = 1 << 14
REGION = 1 << 20


@pytest.fixture(params=["files", "staging"])
def staging(request: pytest.FixtureRequest) -> mmap.mmap | None:
    return mmap.mmap(-1, REGION) if request.param == "staging" else None


@pytest.fixture
def packers(staging: mmap.mmap | None) -> Iterator[Packers]:
    made = Packers(3, staging=staging, region_bytes=REGION)
    yield made
    made.close()


def blocks_in(packers: Packers | None, stored: torch.dtype, rank: int = 40) -> Blocks:
    """Their weights lie where `packers` wants them."""

    def placed(weight: torch.Tensor) -> torch.Tensor:
        if packers is None:
            return weight
        return packers.memory(weight.nbytes).view(stored).view(weight.shape).copy_(weight)

    random = torch.Generator().manual_seed(0)
    found = []
    for site in SITES:
        a = torch.randn(rank - site.index, site.in_features, generator=random).to(stored)
        b = torch.randn(site.slices[0].out_features, rank - site.index, generator=random).to(stored)
        found.append(LowRank(site.layer, "o_proj", placed(a), placed(b).T, scaling=1.7))
    return Blocks.of(Adapter(tuple(found), ""))


def packed(packers: Packers, blocks: Blocks, target: PackTarget) -> torch.Tensor:
    """In memory that others lie in, too, where it is shared."""
    layout = target.layout(blocks.shape(SITES))
    buffers = SharedBuffers(packers._staging)
    before = buffers.take(5000)
    buffer = buffers.take(layout.num_pages * PAGE)
    out = buffer.tensor().view(-1, PAGE)
    out.zero_()  # others have been packed there

    def write(jobs: list[PackJob], dtype: torch.dtype, out: torch.Tensor) -> None:
        packers.write(jobs, dtype, out, buffer)

    try:
        pack([blocks], target, layout, out, write)
    finally:
        buffers.sent(buffer)
        buffers.sent(before)
    assert not before.tensor().any()
    return out


def packed_here(stored: torch.dtype, target: PackTarget) -> torch.Tensor:
    return packed(Packers(0), blocks_in(None, stored), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_bytes_as_in_one_process(packers: Packers, stored: torch.dtype, dtype: torch.dtype) -> None:
    target = PackTarget(SITES, dtype, PAGE)
    for _ in range(2):
        assert torch.equal(packed(packers, blocks_in(packers, stored), target), packed_here(stored, target))
    assert len(packers._packers) == 3, "and all of them are alive"


def test_a_weight_that_is_not_finite_is_named(packers: Packers) -> None:
    target = PackTarget(SITES, torch.float16, PAGE)
    blocks = blocks_in(packers, torch.float32)
    blocks.low_rank[3, "o_proj"].b[2, 7] = 1e6
    with pytest.raises(AdapterInvalid, match=r"layer 3 o_proj lora_B: a weight is not finite in torch\.float16"):
        packed(packers, blocks, target)
    good = packed(packers, blocks_in(packers, torch.float32), target)
    assert torch.equal(good, packed_here(torch.float32, target)), "and the next adapter is packed"
    assert len(packers._packers) == 3, "by the same processes"


def test_what_lies_elsewhere_is_packed_here(packers: Packers) -> None:
    target = PackTarget(SITES, torch.bfloat16, PAGE)
    mixed, private = blocks_in(packers, torch.bfloat16), blocks_in(None, torch.bfloat16)
    mixed.low_rank[1, "o_proj"] = private.low_rank[1, "o_proj"]
    assert torch.equal(packed(packers, mixed, target), packed_here(torch.bfloat16, target))


def test_when_a_process_dies_the_adapter_is_packed_all_the_same(packers: Packers, caplog) -> None:
    target = PackTarget(SITES, torch.bfloat16, PAGE)
    os.kill(packers._packers[1].pid, signal.SIGKILL)
    for _ in range(2):
        found = packed(packers, blocks_in(packers, torch.bfloat16), target)
        assert torch.equal(found, packed_here(torch.bfloat16, target))
    assert "a packing process has died" in caplog.text


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="files have no name to look for")
def test_they_keep_no_file() -> None:
    """Else an adapter's memory would stay until the next one comes, and that one would wait while it is freed."""
    packers = Packers(3, region_bytes=REGION)
    packed(packers, blocks_in(packers, torch.float32), PackTarget(SITES, torch.float32, PAGE))
    end = time.monotonic() + 10
    for packer in packers._packers:
        while "multilora-adapter" in Path(f"/proc/{packer.pid}/maps").read_text():
            assert time.monotonic() < end
            time.sleep(0.001)
    packers.close()


SLABS = [(start, start + 64, min(1000, 50_000 - start)) for start in range(0, 50_000, 1000)]


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    """A file, and what is in it."""
    data = os.urandom(50_000)
    (tmp_path / "file").write_bytes(data)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd, data
    os.close(fd)


def test_what_the_system_has_at_hand_is_read(packers: Packers, stored: tuple[int, bytes]) -> None:
    """Whatever was read is right, and whatever was not is named."""
    fd, data = stored
    memory = packers.memory(50_100)
    memory.fill_(7)
    left = packers.read(fd, SLABS, memory)
    assert set(left) <= set(SLABS)
    for first, at, nbytes in set(SLABS) - set(left):
        assert memory[at : at + nbytes].numpy().tobytes() == data[first : first + nbytes]
    assert bool((memory[:64] == 7).all()) and bool((memory[50_064:] == 7).all())
    if not read_cached(fd, 0, memoryview(bytearray(10))):
        pytest.skip("this file system does not say what it has at hand")
    assert left == []


def test_reading_beyond_the_end_is_left_to_the_caller(packers: Packers, stored: tuple[int, bytes]) -> None:
    assert (49_900, 0, 200) in packers.read(stored[0], [(49_900, 0, 200), (0, 200, 10)], packers.memory(300))
    assert not read_cached(stored[0], 49_999, memoryview(bytearray(2)))


def test_nothing_is_read_into_memory_of_others(packers: Packers, stored: tuple[int, bytes]) -> None:
    memory = torch.zeros(50_100, dtype=torch.uint8)
    assert packers.read(stored[0], SLABS, memory) == SLABS
    assert Packers(0).read(stored[0], SLABS, memory) == SLABS
    assert not memory.any()


def test_when_a_process_dies_all_is_left_to_the_caller(packers: Packers, stored: tuple[int, bytes], caplog) -> None:
    os.kill(packers._packers[0].pid, signal.SIGKILL)
    memory = packers.memory(50_100)
    for _ in range(2):
        assert packers.read(stored[0], SLABS, memory) == SLABS
    assert "a packing process has died" in caplog.text


def test_an_order_that_was_given_up_does_not_answer_the_next_one(
    packers: Packers, stored: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are still on their way, and say of other bytes that they have been read."""

    def fail(connection: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(module, "_answer", fail)
    with pytest.raises(MemoryError):
        packers.read(stored[0], SLABS, packers.memory(50_100))
    monkeypatch.undo()
    assert packers.read(stored[0], SLABS, packers.memory(50_100)) == SLABS


def test_with_as_many_processes_as_there_may_be(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """A container may limit them; the loader has to start all the same."""
    fork, forked, before = os.fork, [], len(os.listdir("/proc/self/fd"))

    def limited() -> int:
        if len(forked) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        forked.append(None)
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    packers = Packers(5, region_bytes=REGION)
    target = PackTarget(SITES, torch.bfloat16, PAGE)
    found = packed(packers, blocks_in(packers, torch.bfloat16), target)
    assert torch.equal(found, packed_here(torch.bfloat16, target))
    assert "adapters load slower: 2 of 5 packing processes: " in caplog.text
    packers.close()
    del found  # a file of its own
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_address_space_everything_is_packed_here(caplog) -> None:
    packers = Packers(2, region_bytes=1 << 60)
    target = PackTarget(SITES, torch.bfloat16, PAGE)
    found = packed(packers, blocks_in(packers, torch.bfloat16), target)
    assert torch.equal(found, packed_here(torch.bfloat16, target))
    assert "adapters load slower: 0 of 2 packing processes: " in caplog.text


def test_close_ends_them() -> None:
    packers = Packers(2, region_bytes=REGION)
    pids = [packer.pid for packer in packers._packers]
    packers.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_region_takes_memory_back_when_its_last_view_is_gone() -> None:
    region = Region(10_000)
    first, second = region.allocate(4000), region.allocate(4000)
    assert [region.offset_of(first), region.offset_of(second)] == [0, 4096]
    assert region.offset_of(region.allocate(4000)) is None, "full: private memory"
    view = first[100:200].view(torch.float32)
    del first
    gc.collect()
    assert region.offset_of(region.allocate(4000)) is None, "a view is still in use"
    assert region.offset_of(view) == 100
    del view
    gc.collect()
    assert region.offset_of(region.allocate(4000)) == 0
    assert region.offset_of(torch.empty(3)) is None
    assert region.allocate(0).numel() == 0
