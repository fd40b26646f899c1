"""Mapped files: the bytes of the file, shared, no descriptor kept; populating changes nothing, on any kernel; memory
of our own is zero."""

import mmap
import os
from pathlib import Path

import torch

from multilora.adapters.host import mapping
from multilora.adapters.host.mapping import map_file, own_memory, prefault_read
from multilora.adapters.host.shared_buffers import SharedBuffers

SIZE = 8 * mmap.PAGESIZE


def test_a_file_is_mapped_from_its_start_and_shared() -> None:
    buffers = SharedBuffers()
    file = buffers.take(SIZE)
    file.memory[:4] = b"abcd"
    before = len(os.listdir("/proc/self/fd"))
    memory = map_file(file.fd, SIZE // 2)
    assert len(os.listdir("/proc/self/fd")) == before
    buffers.sent(file)
    assert memory[:4].tolist() == list(b"abcd") and memory.nbytes == SIZE // 2
    file.memory[SIZE // 2 - 1] = 7
    assert memory[-1] == 7


def test_populating_leaves_the_bytes_alone(monkeypatch) -> None:
    monkeypatch.setattr(mapping, "POPULATE_BYTES", 3 * mmap.PAGESIZE)
    buffers = SharedBuffers()
    file = buffers.take(SIZE)
    file.memory[:] = bytes(range(256)) * (SIZE // 256)
    memory = map_file(file.fd, SIZE)
    prefault_read(memory)
    assert memory.numpy().tobytes() == bytes(file.memory)
    buffers.sent(file)


def test_prefaulting_what_the_file_has_lost_meanwhile_is_harmless() -> None:
    buffers = SharedBuffers()
    file = buffers.take(SIZE)
    memory = map_file(file.fd, SIZE)
    file.memory[0] = 5
    os.ftruncate(file.fd, mmap.PAGESIZE)
    prefault_read(memory)
    assert memory[0] == 5
    buffers.sent(file)


def test_populating_private_memory() -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    prefault_read(memory[3:])
    assert memory.tolist() == list(range(100))


def test_memory_of_our_own_is_zero_and_goes_with_its_last_view() -> None:
    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum(1 for line in lines if line.split()[4] == "0")

    before = mapped()
    held = [own_memory(64 * mmap.PAGESIZE) for _ in range(20)]
    assert not any(memory.any() for memory in held) and held[0].nbytes == 64 * mmap.PAGESIZE
    view = held[0].view(64, -1)[2:]
    view[:] = 3
    held.clear()
    assert bool((view == 3).all())
    del view
    assert mapped() < before + 10
