"""Ranks that sum through each other's memory, for tests. Without a GPU they are processes and Triton interprets the
kernels; with two, they are devices of this process.
"""

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from multilora.distributed import exchange as module
from multilora.distributed.exchange import Exchange

ON_GPU = torch.cuda.is_available()
MARKS = [
    *([pytest.mark.gpu] if ON_GPU else []),
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SIZES = [2] if ON_GPU else [2, pytest.param(4, marks=pytest.mark.slow)]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]  # the interpreter has no bf16
WIDTH = 64  # words of the widest row
GATHERED = 40_000  # numbers of one rank


@dataclass
class Memory:
    addresses: list[int]


def make_ranks(size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exchange]]:
    """A group of so many ranks."""
    from multilora.distributed.triton_gather import FLAG_BYTES

    monkeypatch.setattr(module, "WIDTH", WIDTH)
    monkeypatch.setattr(module, "GATHER_BYTES", 2 * size * 4 * GATHERED)
    devices = [torch.device("cuda", rank) if ON_GPU else torch.device("cpu") for rank in range(size)]
    nbytes = module.sums_bytes(size) + size * FLAG_BYTES + module.GATHER_BYTES
    memory = [torch.zeros(nbytes // 8, dtype=torch.int64, device=device) for device in devices]
    if not ON_GPU:
        memory = [m.share_memory_() for m in memory]
    if ON_GPU:
        memory[0][:1].copy_(memory[1][:1])  # torch opens the way from each device to the other
        memory[1][:1].copy_(memory[0][:1])
    found = [Exchange(Memory([m.data_ptr() for m in memory]), i, size, device) for i, device in enumerate(devices)]
    for rank in found:
        if not ON_GPU:
            for shared in (rank.counts, rank.gather_counts, rank.stop):
                shared.share_memory_()
    yield found
    memory.clear()


def everywhere(ranks: list[Exchange], function: Callable[[Exchange], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """What it returns on each rank, all running at a time."""
    if not ON_GPU:
        return in_processes(ranks, function)
    for wait in (False, True):  # once without: to compile and to take memory may wait for another device
        found = []
        for rank, exchange in enumerate(ranks):
            torch.cuda.set_device(rank)
            exchange.stop.fill_(not wait)
            found.append(function(exchange))  # only launched so far
        for rank in range(len(ranks)):
            torch.cuda.synchronize(rank)
    return [[t.cpu() for t in tensors] for tensors in found]


def in_processes(
    ranks: list[Exchange], function: Callable[[Exchange], list[torch.Tensor]]
) -> list[list[torch.Tensor]]:
    """Forked ones, which see the same shared memory at the same addresses."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in ranks]

    def run(rank: int) -> None:
        pipes[rank][1].send_bytes(pickle.dumps([t.tolist() for t in function(ranks[rank])]))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(len(ranks))]
    for process in processes:
        process.start()
    try:
        assert all(pipe.poll(60.0) for pipe, _ in pipes), "a rank does not come to an end"
        return [[torch.tensor(x) for x in pickle.loads(pipe.recv_bytes())] for pipe, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def shares(size: int, rows: int, columns: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=g).to(dtype) for _ in range(size)]


def summed(parts: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total.to(parts[0].dtype)
