"""Mapped files: the bytes of the file, shared, no descriptor kept; populating changes nothing, on any kernel."""

import mmap
import os

import torch

from multilora.adapters import mapping
from multilora.adapters.mapping import map_file, populate
from multilora.adapters.page_files import PageFile

SIZE = 8 * mmap.PAGESIZE


def test_a_file_is_mapped_from_its_start_and_shared() -> None:
    file = PageFile(SIZE)
    file.memory[:4] = b"abcd"
    before = len(os.listdir("/proc/self/fd"))
    memory = map_file(file.fd, SIZE // 2)
    assert len(os.listdir("/proc/self/fd")) == before
    file.close()
    assert memory[:4].tolist() == list(b"abcd") and memory.nbytes == SIZE // 2
    file.memory[SIZE // 2 - 1] = 7
    assert memory[-1] == 7


def test_populating_leaves_the_bytes_alone(monkeypatch) -> None:
    monkeypatch.setattr(mapping, "POPULATE_BYTES", 3 * mmap.PAGESIZE)
    file = PageFile(SIZE)
    file.memory[:] = bytes(range(256)) * (SIZE // 256)
    memory = map_file(file.fd, SIZE)
    populate(memory)
    assert memory.numpy().tobytes() == bytes(file.memory)
    file.close()


def test_populating_what_the_file_has_lost_meanwhile_harms_nobody() -> None:
    """As when a smaller adapter came in the file while it was being mapped."""
    file = PageFile(SIZE)
    memory = map_file(file.fd, SIZE)
    file.memory[0] = 5
    file.shrink(mmap.PAGESIZE)
    populate(memory)
    assert memory[0] == 5
    file.close()


def test_populating_private_memory() -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    populate(memory[3:])
    assert memory.tolist() == list(range(100))
