"""Places for pages: zero when given out, apart from each other, shared by descriptor or in the staging memory."""

import mmap
import os
import random
import time

import pytest

from multilora.adapters.host.shared_buffers import SharedBuffer, SharedBuffers

SIZE = 4 * mmap.PAGESIZE
STAGING = 4 * SIZE


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def until_free(buffers: SharedBuffers, size: int) -> SharedBuffer:
    """Zeroing takes its time, on another thread."""
    end = time.monotonic() + 10
    while (buffer := buffers.take(size)).fd is not None:
        buffers.drop(buffer)
        assert time.monotonic() < end
        time.sleep(0.001)
    return buffer


def test_a_file_is_zero_and_shared_by_its_descriptor() -> None:
    before = descriptors()
    buffers = SharedBuffers()
    buffer = buffers.take(SIZE)
    assert (buffer.start, buffer.size, os.fstat(buffer.fd).st_size) == (0, SIZE, SIZE)
    assert not buffer.tensor().any() and buffer.tensor().numel() == SIZE
    buffer.memory[SIZE - 1] = 7
    assert os.pread(buffer.fd, 1, SIZE - 1) == b"\7"
    buffers.sent(buffer)
    assert buffer.tensor()[-1] == 7, "its memory outlives its descriptor"
    del buffer
    assert descriptors() == before


def test_staging_memory_first_then_files() -> None:
    staging = mmap.mmap(-1, STAGING)
    buffers = SharedBuffers(staging)
    first, second, third = buffers.take(SIZE), buffers.take(2 * SIZE + 1), buffers.take(SIZE)
    assert [buffer.fd is None for buffer in (first, second, third)] == [True, True, False]
    assert (first.start, second.start) == (0, SIZE)
    second.tensor().fill_(5)
    assert staging[SIZE : 3 * SIZE + 1] == b"\5" * (2 * SIZE + 1)
    assert not first.tensor().any() and not third.tensor().any()
    buffers.drop(third)


def test_what_is_given_back_is_zero_again() -> None:
    buffers = SharedBuffers(mmap.mmap(-1, STAGING))
    buffer = buffers.take(STAGING)
    buffer.tensor().fill_(255)
    buffers.sent(buffer)
    assert buffers.take(SIZE).fd is not None, "it is in use until somebody says otherwise"
    buffers.give_back(buffer.start)
    again = until_free(buffers, STAGING)
    assert not again.tensor().any()


def test_a_dropped_buffer_is_free_again() -> None:
    buffers = SharedBuffers(mmap.mmap(-1, STAGING))
    buffers.drop(buffers.take(STAGING))
    until_free(buffers, STAGING)


@pytest.mark.parametrize("staging", [None, STAGING])
def test_an_unknown_part_may_be_given_back(staging: int | None) -> None:
    """As a loader is told whose predecessor gave it out."""
    buffers = SharedBuffers(mmap.mmap(-1, staging) if staging else None)
    taken = buffers.take(SIZE)
    buffers._free(SIZE)
    assert buffers.take(SIZE).start == (SIZE if staging else 0)
    buffers.sent(taken)


def test_what_others_use_is_given_out_when_it_is_taken_over_and_zero() -> None:
    staging = mmap.mmap(-1, STAGING)
    staging[:] = b"\7" * STAGING
    buffers = SharedBuffers(staging, in_use=True)
    elsewhere = buffers.take(SIZE)
    assert elsewhere.fd is not None
    buffers.give_back(0)  # of a loader before this one
    buffers.take_over()
    again = until_free(buffers, SIZE)
    assert again.start == 0 and staging[:] == bytes(STAGING)
    buffers._zeroing.submit(lambda: None).result()
    assert buffers.take(SIZE).start == SIZE, "what had been given back before is nobody else's"
    buffers.drop(elsewhere)


def test_in_any_order_no_two_places_overlap() -> None:
    rng = random.Random(0)
    buffers = SharedBuffers(mmap.mmap(-1, STAGING))
    held: list[SharedBuffer] = []
    staged = 0
    for value in range(300):
        if held and rng.random() < 0.5:
            buffer = held.pop(rng.randrange(len(held)))
            buffers.sent(buffer)
            if buffer.fd is None:
                buffers._free(buffer.start)
        else:
            buffer = buffers.take(rng.randrange(1, SIZE))
            assert not buffer.tensor().any()
            buffer.tensor().fill_(value % 255 + 1)
            held.append(buffer)
            staged += buffer.fd is None
        for buffer in held:
            assert bool((buffer.tensor() == buffer.tensor()[0]).all())
    assert staged > 50
    for buffer in held:
        buffers.sent(buffer)


def test_where_a_file_cannot_be_had_no_descriptor_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    buffers = SharedBuffers()
    with pytest.raises(OSError):
        buffers.take(1 << 62)

    def refuse(*args: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate"):
        buffers.take(SIZE)
    assert descriptors() == before


def test_without_memory_files_a_temporary_one_is_reserved_on_its_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a full disk is an error and no signal."""

    def refuse(name: str) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    buffer = SharedBuffers().take(SIZE)
    assert os.fstat(buffer.fd).st_blocks * 512 >= SIZE
    assert not buffer.tensor().any()
    os.close(buffer.fd)
    before = descriptors()
    with pytest.raises(OSError):
        SharedBuffers().take(1 << 60)
    assert descriptors() == before
