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


def until_free(places: SharedBuffers, size: int) -> SharedBuffer:
    """Zeroing takes its time, on another thread."""
    end = time.monotonic() + 10
    while (place := places.take(size)).fd is not None:
        places.drop(place)
        assert time.monotonic() < end
        time.sleep(0.001)
    return place


def test_a_file_is_zero_and_shared_by_its_descriptor() -> None:
    before = descriptors()
    places = SharedBuffers()
    place = places.take(SIZE)
    assert (place.start, place.size, os.fstat(place.fd).st_size) == (0, SIZE, SIZE)
    assert not place.tensor().any() and place.tensor().numel() == SIZE
    place.memory[SIZE - 1] = 7
    assert os.pread(place.fd, 1, SIZE - 1) == b"\7"
    places.sent(place)
    assert place.tensor()[-1] == 7, "its memory outlives its descriptor"
    del place
    assert descriptors() == before


def test_staging_memory_first_then_files() -> None:
    staging = mmap.mmap(-1, STAGING)
    places = SharedBuffers(staging)
    first, second, third = places.take(SIZE), places.take(2 * SIZE + 1), places.take(SIZE)
    assert [place.fd is None for place in (first, second, third)] == [True, True, False]
    assert (first.start, second.start) == (0, SIZE)
    second.tensor().fill_(5)
    assert staging[SIZE : 3 * SIZE + 1] == b"\5" * (2 * SIZE + 1)
    assert not first.tensor().any() and not third.tensor().any()
    places.drop(third)


def test_what_is_given_back_is_zero_again() -> None:
    places = SharedBuffers(mmap.mmap(-1, STAGING))
    place = places.take(STAGING)
    place.tensor().fill_(255)
    places.sent(place)
    assert places.take(SIZE).fd is not None, "it is in use until somebody says otherwise"
    places.give_back(place.start)
    again = until_free(places, STAGING)
    assert not again.tensor().any()


def test_what_nobody_got_is_free_again() -> None:
    places = SharedBuffers(mmap.mmap(-1, STAGING))
    places.drop(places.take(STAGING))
    until_free(places, STAGING)


@pytest.mark.parametrize("staging", [None, STAGING])
def test_a_place_of_which_nobody_knows_is_given_back(staging: int | None) -> None:
    """As a loader is told whose predecessor gave it out."""
    places = SharedBuffers(mmap.mmap(-1, staging) if staging else None)
    taken = places.take(SIZE)
    places._free(SIZE)
    assert places.take(SIZE).start == (SIZE if staging else 0)
    places.sent(taken)


def test_what_others_use_is_given_out_when_it_is_taken_over_and_zero() -> None:
    staging = mmap.mmap(-1, STAGING)
    staging[:] = b"\7" * STAGING
    places = SharedBuffers(staging, in_use=True)
    elsewhere = places.take(SIZE)
    assert elsewhere.fd is not None
    places.give_back(0)  # of a loader before this one
    places.take_over()
    again = until_free(places, SIZE)
    assert again.start == 0 and staging[:] == bytes(STAGING)
    places._zeroing.submit(lambda: None).result()
    assert places.take(SIZE).start == SIZE, "what had been given back before is nobody else's"
    places.drop(elsewhere)


def test_in_any_order_no_two_places_overlap() -> None:
    rng = random.Random(0)
    places = SharedBuffers(mmap.mmap(-1, STAGING))
    held: list[SharedBuffer] = []
    staged = 0
    for value in range(300):
        if held and rng.random() < 0.5:
            place = held.pop(rng.randrange(len(held)))
            places.sent(place)
            if place.fd is None:
                places._free(place.start)
        else:
            place = places.take(rng.randrange(1, SIZE))
            assert not place.tensor().any()
            place.tensor().fill_(value % 255 + 1)
            held.append(place)
            staged += place.fd is None
        for place in held:
            assert bool((place.tensor() == place.tensor()[0]).all())
    assert staged > 50
    for place in held:
        places.sent(place)


def test_where_a_file_cannot_be_had_no_descriptor_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    places = SharedBuffers()
    with pytest.raises(OSError):
        places.take(1 << 62)

    def refuse(*args: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate"):
        places.take(SIZE)
    assert descriptors() == before


def test_without_memory_files_a_temporary_one_is_reserved_on_its_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a full disk is an error and no signal."""

    def refuse(name: str) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    place = SharedBuffers().take(SIZE)
    assert os.fstat(place.fd).st_blocks * 512 >= SIZE
    assert not place.tensor().any()
    os.close(place.fd)
    before = descriptors()
    with pytest.raises(OSError):
        SharedBuffers().take(1 << 60)
    assert descriptors() == before
