"""Two ways to divide adapters among the ranks of a tensor-parallel group, the LoRA kernels of a decode step each.

    python -m bench.lora_ranks --tp-size 2 [--rows 1 8 64] [--adapter-ranks 16 64] [--out FILE]

Llama-3.1-8B's dimensions, seven modules, bf16, every row on an adapter of its own; all layers in one CUDA graph. B is
cut along with the base in both where the base is cut by columns, A where it is cut by rows.

    without exchange   what the engine does. By columns (q, k, v, gate, up): every rank holds A whole and computes all
                       of h. By rows (o, down): B is whole and acts on the partial h of the rank's own inputs, and the
                       base's own sum over ranks adds that up, too.
    S-LoRA's           arXiv:2311.03285, section 6. By columns: a rank holds its share of A's rows, and h is gathered.
                       By rows: h is summed over ranks, and a rank holds its share of B's columns; the base's own sum
                       puts the shares together. 1/N of the bytes, and one more exchange of h a site.

S-LoRA's exchange is a launch of its own here, of the kernel that sums small tensors; what summing the column splits
of h before it would take is left out, so its time is the least that it could be. Last line: JSON.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

from bench.common import environment, finish, say
from bench.lora_kernels import HIDDEN, INTER, KV, Shape, Workload, World, graph_ms, llama_sites
from multilora.distributed.group import Group, join
from multilora.lora.triton_backend import TritonLora

SECONDS = 120.0
WITHOUT, SLORA = "without exchange", "S-LoRA's"
BY_COLUMNS = ("qkv_proj", "gate_up_proj")

Found = dict[tuple[int, int, str], tuple[float, float]]
"""(adapters' rank, rows, form) → milliseconds, and GB of adapters that a rank reads."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--adapter-ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    if torch.cuda.device_count() < args.tp_size:
        parser.error(f"PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if any(rank % (8 * args.tp_size) for rank in args.adapter_ranks):
        parser.error(f"--adapter-ranks: shares of whole panels need multiples of {8 * args.tp_size}")
    result: dict[str, Any] = environment("triton")
    result["tp_size"], result["rows"] = args.tp_size, []
    for (rank, rows, form), (ms, gb) in measure(args.tp_size, args.rows, args.adapter_ranks).items():
        say(f"  rank {rank:>3}, {rows:>2} rows, {form:<18}{ms:8.3f} ms   {gb:6.2f} GB read")
        result["rows"].append({"rank": rank, "rows": rows, "form": form, "ms": round(ms, 4), "gb": round(gb, 3)})
    finish(result, args.out)
    return 0


def measure(size: int, rows: list[int], ranks: list[int]) -> Found:
    """As rank 0 sees it."""
    directory = tempfile.mkdtemp(prefix="multilora-bench-")
    context = get_context("spawn")
    times = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(directory, number, size, rows, ranks, times), daemon=True)
        for number in range(size)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        codes = [process.exitcode for process in processes]
        if any(code != 0 for code in codes):
            raise RuntimeError(f"a rank failed: exit codes {codes}")
        found: Found = times.get()
        return found
    finally:
        for process in processes:
            process.kill()
        shutil.rmtree(directory)


def _rank(directory: str, number: int, size: int, rows: list[int], ranks: list[int], times: Any) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    group = join(str(Path(directory, "meeting")), number, size, device, SECONDS)
    found = Found()
    for rank in ranks:
        for form, make in ((WITHOUT, _without), (SLORA, _slora)):
            for count, (step, nbytes) in make(group, size, rank, rows).items():
                group.minimum(0)  # all begin together
                found[rank, count, form] = graph_ms(step), nbytes / 1e9
            torch.cuda.empty_cache()
    if number == 0:
        times.put(found)
    group.minimum(0)  # nobody leaves while another still measures
    group.close()


Steps = dict[int, tuple[Callable[[], None], int]]
"""rows → a step, and the bytes of adapters that it reads."""


def _shapes(size: int, out: int) -> tuple[Shape, ...]:
    """What a rank holds; `out`: the outputs of o and down."""
    return (
        ("qkv_proj", HIDDEN, (("q_proj", HIDDEN // size), ("k_proj", KV // size), ("v_proj", KV // size))),
        ("o_proj", HIDDEN // size, (("o_proj", out),)),
        ("gate_up_proj", HIDDEN, (("gate_proj", INTER // size), ("up_proj", INTER // size))),
        ("down_proj", INTER // size, (("down_proj", out),)),
    )


def _workload(count: int) -> Workload:
    return Workload(f"{count} rows", count, tuple(range(count)))


def _without(_group: Group, size: int, rank: int, rows: list[int]) -> Steps:
    world = World((rank,) * max(rows), llama_sites(shapes=_shapes(size, HIDDEN)), max(rows))
    steps: Steps = {}
    for count in rows:
        backend = TritonLora(world.table, world.sites)
        backend.prepare(_workload(count).segments, count)
        nbytes = world.limit_bytes(_workload(count))
        steps[count] = partial(world.step, backend, count), nbytes
    return steps


def _slora(group: Group, size: int, rank: int, rows: list[int]) -> Steps:
    """A and B have ranks of their own where A is cut by its rows: one table to shrink by, one to expand by."""
    sites = llama_sites(shapes=_shapes(size, HIDDEN // size))
    cut, entire = (World((r,) * max(rows), sites, max(rows)) for r in (rank // size, rank))
    steps: Steps = {}
    for count in rows:
        work = _workload(count)
        halves = TritonLora(cut.table, sites), TritonLora(entire.table, sites)
        for backend in halves:
            backend.prepare(work.segments, count)
        hs = {n: torch.zeros(count, n * rank, dtype=torch.float32, device="cuda") for n in (1, 2, 3)}

        def step(halves: tuple[TritonLora, TritonLora] = halves, count: int = count, hs: Any = hs) -> None:
            for site in sites:
                world, backend = (cut, halves[0]) if site.name in BY_COLUMNS else (entire, halves[1])
                backend.shrink(world.rows[site.in_features][:count], site.index)
                group.all_reduce(hs[len(site.slices)])
                halves[1].expand(entire.out[site.out_features][:count], site.index)

        each = sum(
            len(s.slices) * s.in_features * (rank // size if s.name in BY_COLUMNS else rank) + rank * s.out_features
            for s in sites
        )
        steps[count] = step, 2 * each * count
    return steps


if __name__ == "__main__":
    sys.exit(main())
