"""Copies to a GPU: bytes arrive where they should, in any number and order; errors come out; the link is used."""

import random
import time

import pytest
import torch

from multilora.adapters.device import ring_copier
from multilora.adapters.device.ring_copier import RingCopier, RingCopy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PAGE = 4096


def wait(copy: RingCopy) -> None:
    end = time.monotonic() + 20
    while not copy.done():
        assert time.monotonic() < end, "a copy does not come to an end"
        time.sleep(0.0002)


def numbers(pages: int, page_bytes: int = PAGE) -> torch.Tensor:
    return torch.randint(0, 256, (pages, page_bytes), dtype=torch.uint8)


@pytest.mark.parametrize("count", [1, 2, 3, 29])
def test_bytes_arrive_at_their_pages_and_nowhere_else(count: int) -> None:
    """29 pages in slots of 2: the ring wraps."""
    arena = torch.full((64, PAGE), 7, dtype=torch.uint8, device="cuda")
    pages = random.Random(count).sample(range(64), count)
    buffer = numbers(count)
    wait(RingCopier(arena, slots=2, slot_bytes=2 * PAGE).start_copy(buffer, pages))
    assert torch.equal(arena[pages].cpu(), buffer)
    others = sorted(set(range(64)) - set(pages))
    assert bool((arena[others] == 7).all())


def test_a_page_larger_than_a_slot_has_room() -> None:
    arena = torch.zeros(3, PAGE, dtype=torch.uint8, device="cuda")
    buffer = numbers(2)
    wait(RingCopier(arena, slot_bytes=100).start_copy(buffer, [2, 0]))
    assert torch.equal(arena[[2, 0]].cpu(), buffer)


def test_many_copies_at_once() -> None:
    arena = torch.zeros(512, PAGE, dtype=torch.uint8, device="cuda")
    copier = RingCopier(arena, slots=2, slot_bytes=3 * PAGE)
    pages = random.Random(0).sample(range(512), 512)
    shares, at = [], 0
    for size in [1, 7, 40, 2, 100, 62, 200, 100]:
        shares.append((pages[at : at + size], numbers(size)))
        at += size
    copies = [copier.start_copy(buffer, own) for own, buffer in shares]
    for copy, (own, buffer) in zip(copies, shares, strict=True):
        wait(copy)
        assert torch.equal(arena[own].cpu(), buffer), "done means that it is there"


def test_done_waits_for_the_last_byte() -> None:
    """A stream that reads the pages as soon as `done` says so never sees old bytes."""
    arena = torch.zeros(64, 1 << 20, dtype=torch.uint8, device="cuda")
    copier = RingCopier(arena)
    for value in range(1, 6):
        copy = copier.start_copy(torch.full((64, 1 << 20), value, dtype=torch.uint8), list(range(64)))
        wait(copy)
        assert int(arena.min()) == int(arena.max()) == value


def test_an_error_comes_out_and_the_next_copy_works() -> None:
    arena = torch.zeros(8, PAGE, dtype=torch.uint8, device="cuda")
    copier = RingCopier(arena, slot_bytes=PAGE)
    bad = copier.start_copy(numbers(3, PAGE - 1), [0, 1, 2])
    with pytest.raises(RuntimeError):
        wait(bad)
    buffer = numbers(5)
    wait(copier.start_copy(buffer, [7, 6, 5, 4, 3]))
    assert torch.equal(arena[[7, 6, 5, 4, 3]].cpu(), buffer)


def test_steps_go_on_meanwhile() -> None:
    """The copy does not wait for the stream that computes, nor that stream for the copy."""
    arena = torch.zeros(8, PAGE, dtype=torch.uint8, device="cuda")
    copier = RingCopier(arena)
    wait(copier.start_copy(numbers(8), list(range(8))))
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    wait(copier.start_copy(numbers(8), list(range(8))))
    assert not busy.query(), "the copy has waited for the running step"
    busy.synchronize()


def test_after_close_nothing_is_written() -> None:
    """The arena's memory may belong to another engine by then."""
    arena = torch.zeros(64, 1 << 20, dtype=torch.uint8, device="cuda")
    copier = RingCopier(arena)
    buffer = torch.ones(64, 1 << 20, dtype=torch.uint8)
    for _ in range(200):
        copier.start_copy(buffer, list(range(64)))
    copier.close()
    assert not copier._thread.is_alive()
    arena.fill_(201)
    torch.cuda.synchronize()
    time.sleep(0.05)
    assert bool((arena == 201).all())
    copier.close()


def test_pinned_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    slot = ring_copier._RingSlot

    def count(pages: int, page_bytes: int) -> ring_copier._RingSlot:
        made.append(pages * page_bytes)
        return slot(pages, page_bytes)

    monkeypatch.setattr(ring_copier, "_RingSlot", count)
    arena = torch.zeros(40, 2 << 20, dtype=torch.uint8, device="cuda")
    copier = RingCopier(arena)
    for _ in range(3):
        wait(copier.start_copy(numbers(40, 2 << 20), list(range(40))))
    assert sum(made) <= ring_copier.SLOTS * ring_copier.SLOT_BYTES
