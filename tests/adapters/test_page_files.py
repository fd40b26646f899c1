"""Memory files: zero, of the right size, shared by descriptor, and the spare one used where it fits."""

import mmap
import os

import pytest

from multilora.adapters import page_files
from multilora.adapters.page_files import PageFile, PageFiles

SIZE = 4 * mmap.PAGESIZE


def zero(file: PageFile, size: int) -> bool:
    return os.fstat(file.fd).st_size == size and file.memory[:size] == bytes(size)


def test_a_file_is_zero_and_shared_by_its_descriptor() -> None:
    file = PageFiles().take(SIZE)
    assert zero(file, SIZE)
    file.memory[SIZE - 1] = 7
    assert os.pread(file.fd, 1, SIZE - 1) == b"\7"
    file.close()


@pytest.mark.parametrize("wanted", [SIZE, SIZE - mmap.PAGESIZE, 1])
def test_the_spare_file_is_used_where_it_is_large_enough(wanted: int) -> None:
    files = PageFiles()
    files.prepare(SIZE)
    spare = files._spare
    files.prepare(SIZE)
    assert files._spare is spare, "one is enough"
    file = files.take(wanted)
    assert file is spare and zero(file, SIZE)
    file.shrink(wanted)
    assert zero(file, wanted)
    other = files.take(wanted)
    assert other is not file and zero(other, wanted)
    file.close()
    other.close()


def test_a_spare_file_that_is_too_small_goes() -> None:
    files = PageFiles()
    files.prepare(SIZE)
    descriptor = files._spare.fd
    file = files.take(SIZE + 1)
    assert zero(file, SIZE + 1) and files._spare is None
    assert file.fd == descriptor or not os.path.exists(f"/proc/self/fd/{descriptor}")
    file.close()


def test_its_pages_are_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_files, "POPULATE_BYTES", mmap.PAGESIZE)
    files = PageFiles()
    files.prepare(SIZE)
    if os.fstat(files._spare.fd).st_blocks == 0:
        pytest.skip("this kernel cannot fill pages ahead")
    assert os.fstat(files._spare.fd).st_blocks * 512 == SIZE
    files.close()
    assert files._spare is None


def test_filling_stops_when_the_file_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_files, "POPULATE_BYTES", mmap.PAGESIZE)
    files = PageFiles()
    taken: list[PageFile] = []

    class Memory:
        def __init__(self, memory: mmap.mmap):
            self._memory = memory

        def __len__(self) -> int:
            return len(self._memory)

        def madvise(self, *_: int) -> None:
            assert not taken, "it is somebody else's now"
            taken.append(files.take(SIZE))

    def make(size: int) -> PageFile:
        file = PageFile(size)
        file.memory = Memory(file.memory)
        return file

    monkeypatch.setattr(page_files, "PageFile", make)
    files.prepare(SIZE)
    assert len(taken) == 1 and files._spare is None
    taken[0].close()


def test_no_spare_file_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_files, "MAX_SPARE_BYTES", SIZE)
    files = PageFiles()
    files.prepare(SIZE + 1)
    assert files._spare is None


def test_a_spare_file_is_announced_before_anybody_can_take_it() -> None:
    files = PageFiles()
    told: list[PageFile] = []

    def announce(spare: PageFile) -> None:
        assert files._spare is spare and files._lock.locked()
        told.append(spare)

    files.prepare(SIZE, announce)
    assert told == [files._spare]
    files.prepare(SIZE, announce)
    assert len(told) == 1
    files.take(SIZE).close()


def test_one_that_is_taken_while_it_is_filled_is_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    files = PageFiles()
    taken: list[PageFile] = []
    monkeypatch.setattr(page_files, "populate", lambda *_: taken.append(files.take(SIZE)))
    files.prepare(SIZE, lambda spare: pytest.fail("an adapter is in it"))
    assert len(taken) == 1
    taken[0].close()
