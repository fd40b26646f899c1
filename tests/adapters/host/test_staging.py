"""Staging memory: its views and their release, and adapters that move out. On a GPU it is pinned."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from multilora.adapters.device.ring_copier import RingCopier
from multilora.adapters.host import staging as module
from multilora.adapters.host.mapping import HostEntry, map_file
from multilora.adapters.host.staging import Staging
from multilora.lora.panels import AdapterShape, PanelLayout

SIZE = 1 << 16
PAGE = 4096


@pytest.fixture
def staging() -> Iterator[Staging]:
    made = Staging(SIZE)
    yield made
    made.close()


def entry(buffer: torch.Tensor) -> HostEntry:
    return HostEntry(PanelLayout(1, AdapterShape(()), (), (), (), buffer.numel()), buffer)


def until(done) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_view_is_shared_and_given_back_once(staging: Staging) -> None:
    other = map_file(staging.fd, SIZE)
    given_back: list[int] = []
    view = staging.view(PAGE, 2 * PAGE, given_back.append)
    view[5] = 9
    assert other[PAGE + 5] == 9
    part = view.view(2, PAGE)[1:]
    del view
    gc.collect()
    assert not given_back, "somebody still reads it"
    del part
    gc.collect()
    assert given_back == [PAGE]


def test_another_process_finds_a_part_by_path_and_offset(staging: Staging) -> None:
    view = staging.view(4096, 64, lambda _: None)
    view.fill_(7)
    assert staging.offset_of(view) == 4096 and staging.offset_of(view.view(4, 16)[2]) == 4096 + 32
    assert staging.offset_of(torch.zeros(64, dtype=torch.uint8)) is None
    code = f"import sys; f = open({staging.path!r}, 'rb'); f.seek(4096); sys.exit(f.read(64) != bytes([7] * 64))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_is_unused_when_all_have_said_so(staging: Staging) -> None:
    """Not a moment before: what is said then may be taken for a part that was given out since."""
    said: list[bool] = []
    first, second = (staging.view(start, PAGE, lambda start: said.append(staging.unused)) for start in (0, PAGE))
    assert not staging.unused
    del first
    assert not staging.unused
    del second
    gc.collect()
    assert said == [False, False]
    assert staging.unused


def test_an_adapter_moves_out(staging: Staging) -> None:
    given_back: list[int] = []
    buffer = staging.view(2 * PAGE, 3 * PAGE, given_back.append).view(3, PAGE)
    buffer.copy_(torch.arange(3 * PAGE).view(3, PAGE) % 251)
    item = entry(buffer)
    staging.settle(item)
    until(lambda old=buffer: item.buffer is not old)
    assert item.buffer.shape == (3, PAGE) and torch.equal(item.buffer, buffer)
    assert not given_back, "a copy to the device still reads it"
    del buffer
    until(lambda: given_back == [2 * PAGE])
    before = item.buffer
    staging.settle(item)
    elsewhere = entry(torch.ones(2, PAGE, dtype=torch.uint8))
    staging.settle(elsewhere)
    last = entry(staging.view(0, PAGE, given_back.append))
    staging.settle(last)
    until(lambda: len(given_back) == 2)
    assert item.buffer is before, "it has moved already"


def test_one_that_is_unloaded_before_its_turn(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    go, given_back = threading.Event(), []
    move = module._move
    monkeypatch.setattr(module, "_move", lambda item: (go.wait(10), move(item)))
    items = [entry(staging.view(i * PAGE, PAGE, given_back.append)) for i in range(3)]
    for item in items:
        staging.settle(item)
    del items[1], item
    until(lambda: given_back == [PAGE])
    go.set()
    until(lambda: sorted(given_back) == [0, PAGE, 2 * PAGE])


def test_without_memory_it_stays(staging: Staging, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def none_left(nbytes: int) -> torch.Tensor:
        raise MemoryError("none left")

    monkeypatch.setattr(module, "own_memory", none_left)
    buffer = staging.view(0, PAGE, lambda start: None)
    item = entry(buffer)
    staging.settle(item)
    until(lambda: "stays in the staging memory: none left" in caplog.text)
    assert item.buffer is buffer
    monkeypatch.undo()
    other = entry(staging.view(PAGE, PAGE, lambda start: None))
    old = other.buffer
    staging.settle(other)
    until(lambda: other.buffer is not old)


@pytest.mark.parametrize("next_comes", [False, True])
def test_one_that_had_no_memory_moves_once_there_is_some(
    staging: Staging, monkeypatch: pytest.MonkeyPatch, caplog, next_comes: bool
) -> None:
    """It is tried again with the next adapter, and now and then; told once; and not kept alive by that."""
    tried: list[int] = []

    def none_left(nbytes: int) -> torch.Tensor:
        tried.append(nbytes)
        raise MemoryError("none left")

    monkeypatch.setattr(module, "own_memory", none_left)
    monkeypatch.setattr(module, "RETRY_SECONDS", 60.0 if next_comes else 0.05)
    given_back: list[int] = []
    first, unloaded = (entry(staging.view(start, PAGE, given_back.append)) for start in (0, PAGE))
    first.buffer.fill_(7)
    staging.settle(first)
    staging.settle(unloaded)
    until(lambda: caplog.text.count("none left") == 2)
    del unloaded
    until(lambda: given_back == [PAGE])
    before, begun = len(tried), time.monotonic()
    if not next_comes:
        until(lambda: len(tried) >= before + 3)
        assert time.monotonic() - begun > 0.08, "no busy loop"
    assert caplog.text.count("none left") == 2
    monkeypatch.undo()
    if next_comes:
        staging.settle(entry(staging.view(2 * PAGE, PAGE, given_back.append)))
    until(lambda: 0 in given_back)
    assert bool((first.buffer == 7).all())


def test_an_adapter_that_cannot_be_moved_does_not_keep_the_next_from_it(
    staging: Staging, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(module, "own_memory", lambda nbytes: torch.empty(0, dtype=torch.uint8))
    first = entry(staging.view(0, PAGE, lambda start: None))
    staging.settle(first)
    until(lambda: "stays in the staging memory" in caplog.text)
    monkeypatch.undo()
    second = entry(staging.view(PAGE, PAGE, lambda start: None))
    old = second.buffer
    staging.settle(second)
    until(lambda: second.buffer is not old)


def test_close_keeps_views_in_use() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    made = Staging(SIZE)
    view = made.view(0, PAGE, lambda start: None)
    view.fill_(3)
    made.close()
    made.close()
    del made
    gc.collect()
    assert bool((view == 3).all())
    del view
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory_is_copied_from_directly(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    staging.pin()
    copier = RingCopier(torch.zeros(32, PAGE, dtype=torch.uint8, device="cuda"))
    monkeypatch.setattr(copier, "_through_ring", lambda *args: pytest.fail("no ring is needed"))
    buffer = staging.view(PAGE, 5 * PAGE, lambda start: None).view(5, PAGE)
    assert buffer.is_pinned()
    buffer.random_(0, 256)
    copy = copier.start_copy(buffer, [3, 4, 9, 31, 0])
    until(copy.done)
    assert torch.equal(copier._arena[[3, 4, 9, 31, 0]].cpu(), buffer)
    copier.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_cannot_be_pinned_breaks_nothing(staging: Staging, caplog) -> None:
    assert int(torch.cuda.cudart().cudaHostRegister(staging._address, PAGE, 0)) == 0
    assert not staging.pin(), "a part of it is pinned already"
    assert "cannot be pinned" in caplog.text
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert int(torch.cuda.cudart().cudaHostUnregister(staging._address)) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory_is_given_back_with_the_last_view() -> None:
    for _ in range(3):  # the same addresses can be pinned again
        made = Staging(SIZE)
        made.pin()
        view = made.view(0, PAGE, lambda start: None)
        made.close()
        assert view.is_pinned()
        del view
        gc.collect()
        assert not made._pinned
