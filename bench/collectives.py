"""The collectives of a decode step alone: two sums a layer, one of the embedding, and the gathering of the logits.

    python -m bench.collectives --tp-size 2 [--dims llama-8b] [--device cuda] [--out bench/results/collectives.json]

Each rank is a process with a group as the engine's ranks have it; on CUDA everything is in one graph, as in the
engine's decode steps. What a step of `bench.gpu --tp-size` takes over its limit is partly this. Last line: JSON.
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

REPEATS = 20
SECONDS = 120.0


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
        Row(f"collectives of a decode step, batch {batch}, {args.tp_size} ranks", "ms").show(ms)
        for batch, ms in measure(args.dims, args.device, args.tp_size).items()
    ]
    finish(result, args.out)
    return 0


def measure(dims: str, device: str, ranks: int) -> dict[int, float]:
    """Batch → milliseconds, as rank 0 sees them."""
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
        found: dict[int, float] = times.get()
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
    size, work = SIZES[dims]
    group = join(str(Path(directory, "group")), rank, ranks, device, SECONDS)
    found = {batch: _milliseconds(_step(group, size, batch, device), device) for batch in work.batches}
    if rank == 0:
        times.put(found)
    group.minimum(0)  # nobody leaves while another still measures
    group.close()


def _step(group: Group, dims: Dims, batch: int, device: torch.device) -> Callable[[], None]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.zeros(batch, dims.hidden, dtype=dtype, device=device)
    logits = torch.zeros(batch, -(-dims.vocab // group.size), dtype=torch.float32, device=device)

    def run() -> None:
        for _ in range(2 * dims.layers + 1):
            group.all_reduce(hidden)
        group.all_gather(logits)

    if device.type == "cpu":
        return run
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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
