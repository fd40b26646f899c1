"""Below the engine, on a GPU only: copies of adapters to the device, and the LoRA kernels by themselves."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.common import matmul_rate, read_bandwidth, synchronize
from bench.gpu.setup import Bench, Machine
from multilora.adapters.device.ring_copier import RingCopier
from multilora.adapters.host.spare_memory import spare_memory
from multilora.adapters.host.staging import Staging
from multilora.adapters.lifecycle.store import AdapterStore

LINK_BYTES = 1 << 30
COPIED = 16  # adapters
COPY_RUNS = 5


TOUCHED_BYTES = 48 << 30
"""About how much host memory the rows take, for adapters and their files."""


def touch_host_memory() -> float:
    """Touch the memory that the rows will use, but at most half of what is left: a virtual machine may get its memory
    only then, which is not to be measured. Returns bytes per second of this first use."""
    spare = spare_memory()
    nbytes = TOUCHED_BYTES if spare is None else min(TOUCHED_BYTES, spare // 2)
    start = time.perf_counter()
    torch.ones(nbytes, dtype=torch.uint8)
    return nbytes / (time.perf_counter() - start)


def measure(device: torch.device) -> Machine:
    if device.type != "cuda":
        return Machine(device, read_bandwidth(device), matmul_rate(device, 1024), None)
    return Machine(device, read_bandwidth(device, 1 << 32), matmul_rate(device), link_bandwidth(device))


def link_bandwidth(device: torch.device) -> float:
    """Bytes per second of one copy from pinned memory."""
    host = torch.ones(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        there.copy_(host, non_blocking=True)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return LINK_BYTES / best


def copies_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Adapters into scattered pages, against the link itself: from the host tier through the ring of pinned memory,
    and from the staging memory, where the loader packs them."""
    assert bench.machine.link is not None and isinstance(bench.llm.engine.adapters, AdapterStore)
    names = bench.load_group("r16")[:COPIED]
    entries = [bench.llm.engine.adapters.get(bench.infos[name].version).host for name in names]
    staging = Staging()
    staging.pin()
    ordinary = [entry.buffer for entry in entries if entry is not None and not entry.buffer.is_pinned()]
    assert len(ordinary) == COPIED, "they have not settled yet"
    nbytes = ordinary[0].numel()
    fit = range(min(COPIED, staging.nbytes // nbytes))
    pinned = [staging.view(i * nbytes, nbytes, lambda _: None).view(ordinary[0].shape) for i in fit]
    for to, source in zip(pinned, ordinary, strict=False):
        to.copy_(source)
    target, link = round(0.8 * bench.machine.link / 1e9, 1), bench.machine.link / 1e9
    for where, buffers in (("through the ring", ordinary), ("from the staging memory", pinned)):
        row = bench.row(f"host to device, adapters {where}", "GB/s", target)
        yield row.show(_copy_rate(bench, buffers) / 1e9, link)
    del pinned, to
    staging.close()


def _copy_rate(bench: Bench, buffers: list[torch.Tensor]) -> float:
    """Bytes per second of copying all of them, one after the other."""
    count, page_bytes = buffers[0].shape
    total = count * len(buffers)
    arena = torch.empty(total, page_bytes, dtype=torch.uint8, device=bench.machine.device)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
    copier = RingCopier(arena)
    best = float("inf")
    for _ in range(COPY_RUNS):
        start = time.perf_counter()
        copies = [copier.start_copy(b, order[i * count : (i + 1) * count]) for i, b in enumerate(buffers)]
        while not all(copy.done() for copy in copies):
            time.sleep(0.0005)
        best = min(best, time.perf_counter() - start)
    copier.close()
    assert torch.equal(arena[order[-count:]].cpu(), buffers[-1]), "the last adapter did not arrive"
    return total * page_bytes / best


def kernels_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """`bench.lora_kernels`' first workload, in a graph."""
    from bench.lora_kernels import WORKLOADS, World, graph_ms
    from multilora.lora.triton_backend import TritonLora

    work = WORKLOADS[0]
    world = World(ranks=(16,) * len(work.adapters))
    backend = TritonLora(world.table, world.sites)
    backend.prepare(work.segments, work.rows)
    ms = graph_ms(lambda: world.step(backend, work.rows))
    row = bench.row(f"LoRA kernels alone, {work.name}, all layers", "ms", 1.8)
    yield row.show(ms, world.limit_bytes(work) / bench.machine.read * 1e3)
