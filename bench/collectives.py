"""The collectives of a decode step alone: two sums a layer, each with residual and norm behind it, one sum of the
embedding, and the gathering of the logits.

    python -m bench.collectives --tp-size 2 [--dims llama-8b] [--device cuda] [--out bench/results/collectives.json]

Each rank is a process with a group as the engine's ranks have it; on CUDA everything is in one graph, as in the
engine's decode steps, once with NCCL alone and once with the kernels that sum small tensors. The limit is the bytes
that a rank gets from the others, at the bandwidth of a large gathering in the same run. What a step of
`bench.gpu --tp-size` takes over its limit is partly this. Last line: JSON.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.multiprocessing import get_context

from bench.common import Row, environment, finish, synchronize
from bench.gpu.sizes import SIZES, Dims
from multilora.distributed.group import Group, join
from multilora.layers.norm import RMSNorm
from multilora.lora.sites import NormModule

REPEATS = 20
SECONDS = 120.0
ROWS = (1, 8, 32, 64, 128, 256, 512)
LINK_BYTES = 256 << 20

Found = dict[tuple[str, int], tuple[float, float]]
"""(how sums are done, rows) → milliseconds, and the least."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--dims", choices=SIZES, default="llama-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    if args.device == "cuda" and torch.cuda.device_count() < args.tp_size:
        parser.error(f"PyTorch sees {torch.cuda.device_count()} CUDA devices")
    result = environment()
    result["rows"] = [
        Row(f"collectives of a decode step, {rows} rows, {args.tp_size} ranks, {how}", "ms").show(ms, limit)
        for (how, rows), (ms, limit) in measure(args.dims, args.device, args.tp_size).items()
    ]
    finish(result, args.out)
    return 0


def measure(dims: str, device: str, ranks: int) -> Found:
    """As rank 0 sees it."""
    directory = tempfile.mkdtemp(prefix="multilora-bench-")
    context = get_context("spawn")
    times = context.SimpleQueue()
    others = [
        context.Process(target=_rank, args=(directory, rank, ranks, dims, device, times), daemon=True)
        for rank in range(ranks)
    ]
    try:
        for process in others:
            process.start()
        for process in others:
            process.join(SECONDS)
        codes = [process.exitcode for process in others]
        if any(codes):
            raise RuntimeError(f"a rank failed: exit codes {codes}")
        found: Found = times.get()
        return found
    finally:
        for process in others:
            process.kill()
        shutil.rmtree(directory)


def _rank(directory: str, rank: int, ranks: int, dims: str, device_type: str, times: Any) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size, found = SIZES[dims][0], Found()
    for how, custom in (("NCCL" if device.type == "cuda" else "gloo", False), ("custom", True)):
        if custom and device.type == "cpu":
            continue
        group = join(str(Path(directory, how)), rank, ranks, device, SECONDS, custom_all_reduce=custom)
        link = _link_bandwidth(group, device)
        for rows in ROWS:  # a group is not left while a graph holds its collectives
            taken = _milliseconds(_step(group, size, rows, device), device)
            found[how, rows] = taken, 1e3 * _least_bytes(size, rows, ranks) / link
        group.minimum(0)  # nobody leaves while another still measures
        group.close()
    if rank == 0:
        times.put(found)


def _least_bytes(dims: Dims, rows: int, ranks: int) -> float:
    """What a rank must get from others."""
    sums = (2 * dims.layers + 1) * rows * dims.hidden * 2 * (ranks - 1)
    return sums + rows * dims.vocab * 4 * (ranks - 1) / ranks


def _link_bandwidth(group: Group, device: torch.device) -> float:
    """Bytes per second at which a rank gets those of the others."""
    part = torch.ones(LINK_BYTES, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        group.all_gather(part)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return LINK_BYTES * (group.size - 1) / best


@torch.inference_mode()
def _step(group: Group, dims: Dims, rows: int, device: torch.device) -> Callable[[], None]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    share = torch.randn(rows, dims.hidden, dtype=dtype, device=device)
    logits = torch.zeros(rows, -(-dims.vocab // group.size), dtype=torch.float32, device=device)
    norm = RMSNorm(
        NormModule(0, "norm", "model", dims.hidden, before_kv=False), 1e-5, device=device, dtype=dtype, group=group
    )
    norm.weight.fill_(1.0)
    context: Any = _NoAdapters()

    def run() -> None:
        residual = group.all_reduce(share.clone())
        for _ in range(2 * dims.layers):
            _, residual = norm.add(share, residual, context)
        group.all_gather(logits)

    if device.type == "cpu":
        return run
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class _NoAdapters:
    """What a norm asks a `ForwardContext` for."""

    full_weights = None


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    taken = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return median(taken) * 1e3


if __name__ == "__main__":
    sys.exit(main())
