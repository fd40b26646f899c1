"""Finds block sizes of the LoRA kernels: one kind after the other, by the time of a step.

    python -m bench.lora_sweep [--only small|medium|large] [--out bench/results/lora_kernels_sweep.json]

Then measures as `bench/lora_kernels.py` does, with the best. The fields of a phase are tried one after the other, the
others as they are committed or, once tried, best. Kernels are compiled first, by one process per core
(`--compile SHARE OF`), into Triton's cache.
"""

import argparse
import itertools
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

from bench.common import say
from bench.lora_kernels import WORKLOADS, Workload, World, begin, graph_ms, llama_sites, measure
from multilora.batch import LoraSegment
from multilora.lora.triton_backend import TritonLora
from multilora.lora.tuning import CSGMV, GRAPH_ROWS, MEDIUM_ROWS, ExpandBlocks, Phase, ShrinkBlocks, Tuning

Options = dict[str, list]  # field of Phase → what to try

SMALL: Options = {
    "narrow_shrink": [ShrinkBlocks(k=k, warps=w) for k, w in [(256, 2), (256, 4), (512, 2), (512, 4)]],
    "wide_shrink": [ShrinkBlocks(k=k, warps=w) for k, w in [(256, 4), (512, 2), (512, 4)]],
    "narrow_expand": [ExpandBlocks(n=n, warps=w, registers=128) for n, w in [(512, 2), (1024, 4)]],
    "wide_expand": [
        ExpandBlocks(n=n, warps=w, registers=128, tile_n=t)
        for n, w, t in [(512, 2, 128), (1024, 4, 128), (1024, 4, 256)]
    ],
}
MEDIUM_EXPAND = [ExpandBlocks(n=n, warps=4, registers=128) for n in (512, 1024, 2048)]
MEDIUM: Options = {
    "few_rows": [1, 2, 4],
    "parts": [1, 2, 4, 8],
    "narrow_shrink": [
        ShrinkBlocks(k=256, warps=4, registers=64, parts=2),
        *[ShrinkBlocks(k=256, warps=4, parts=p) for p in (1, 2)],
        *[ShrinkBlocks(k=512, warps=4, parts=p) for p in (1, 2)],
        ShrinkBlocks(k=512, warps=4, tile_r=32),
    ],
    "wide_shrink": [ShrinkBlocks(k=k, warps=4) for k in (256, 512, 1024)],
    "narrow_expand": MEDIUM_EXPAND,
    "wide_expand": MEDIUM_EXPAND,
}
LARGE: Options = {
    "narrow_shrink": [ShrinkBlocks(k=k, warps=4, tile_r=64) for k in (512, 1024, 2048)],
    "wide_shrink": [ShrinkBlocks(k=k, warps=4, tile_r=64) for k in (1024, 2048)],
    "narrow_expand": [
        ExpandBlocks(n=n, warps=4, tile_r=r, registers=128) for n, r in [(1024, 32), (1024, 16), (512, 32)]
    ],
    "wide_expand": [
        ExpandBlocks(n=n, warps=4, tile_r=r, registers=128) for n, r in [(1024, 32), (1024, 16), (512, 32)]
    ],
    "gated": [
        ExpandBlocks(n=n, warps=4, tile_n=t, tile_r=32, registers=r)
        for n, t, r in [(512, 64, 128), (1024, 64, 128), (2048, 64, 128), (1024, 64, 96), (1024, 128, 128)]
    ],
}
PHASES: dict[str, tuple[Options, int, range]] = {  # field of Tuning → options, chunk rows, rows of a step
    "small": (SMALL, 16, range(MEDIUM_ROWS)),
    "medium": (MEDIUM, 16, range(MEDIUM_ROWS, GRAPH_ROWS + 1)),
    "large": (LARGE, 32, range(GRAPH_ROWS + 1, 1 << 20)),
}


def compile_all(phases: list[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "bench.lora_sweep", "--only", *phases, "--compile"]
    workers = [subprocess.Popen([*command, str(i), str(cores)]) for i in range(cores)]
    failed = sum(worker.wait() != 0 for worker in workers)
    say(f"compiled on {cores} cores, {failed} workers failed")


def compile_share(phases: list[str], share: int, of: int) -> None:
    """Every expand with every width of a split, because the number of splits is a constant of it."""
    world = World(ranks=(16,), sites=llama_sites(4), max_rows=300)
    jobs = []
    for name in phases:
        options, chunk, _ = PHASES[name]
        shrinks = options["narrow_shrink"] + options["wide_shrink"]
        expands = options["narrow_expand"] + options["wide_expand"]
        widths = list({s.k: s for s in shrinks}.values())
        pairs = [*itertools.product(shrinks, expands[:1]), *itertools.product(widths, expands[1:])]
        found = [Phase(s, s, e, e) for s, e in pairs]
        found += [replace(found[0], gated=blocks) for blocks in options.get("gated", [])]
        jobs += [(phase, chunk, {"small": 16, "medium": 80, "large": 300}[name]) for phase in found]
    for phase, chunk, rows in jobs[share::of]:
        backend = TritonLora(world.table, world.sites, tuning=Tuning(phase, phase, phase), chunk_rows=chunk)
        backend.overlap = backend.overlap and rows < MEDIUM_ROWS
        backend.prepare((LoraSegment(0, rows, (0,), (1.0,)),), rows)
        world.step(backend, rows)


def sweep(world: World, phases: list[str]) -> tuple[Tuning, list[dict[str, Any]]]:
    """The best tuning found, and every time seen, in ms a step."""
    tuning, found = CSGMV, []
    for name in phases:
        options, chunk, rows = PHASES[name]
        works = [w for w in WORKLOADS if w.rows in rows]
        backend = TritonLora(world.table, world.sites, chunk_rows=chunk)
        backend.overlap = backend.overlap and name == "small"  # steps beside the model's products do not start early
        for kind, choices in options.items():
            tried = [
                replace(tuning, **{name: replace(getattr(tuning, name), **{kind: blocks})}) for blocks in choices
            ]
            times = [step_times(world, backend, t, works) for t in tried]
            tuning = tried[best_of(times)]
            for blocks, row in zip(choices, times, strict=True):
                sizes = {kind: blocks} if isinstance(blocks, int) else asdict(blocks)
                sizes = {key: value for key, value in sizes.items() if value is not None}
                text = " ".join(f"{key}={value}" for key, value in sizes.items())
                say(f"{name:<6}{kind:<14}{text:<58}{' '.join(f'{t:7.3f}' for t in row)}")
                ms = {w.name: round(t, 4) for w, t in zip(works, row, strict=True)}
                found.append({"phase": name, "kind": kind, "blocks": sizes, "ms": ms})
        say(f"best: {name}={getattr(tuning, name)}")
    return tuning, found


def step_times(world: World, backend: TritonLora, tuning: Tuning, works: list[Workload]) -> list[float]:
    backend.tuning = tuning
    times = []
    for work in works:
        backend.prepare(work.segments, work.rows)
        times.append(graph_ms(lambda rows=work.rows: world.step(backend, rows), 7))
    return times


def best_of(times: list[list[float]]) -> int:
    """The row with the least sum of times over the best time of each column."""
    floors = [min(column) for column in zip(*times, strict=True)]
    scores = [sum(t / floor for t, floor in zip(row, floors, strict=True)) for row in times]
    return scores.index(min(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the result to this file")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), help="phases to sweep")
    parser.add_argument("--compile", nargs=2, type=int, metavar=("SHARE", "OF"), help="only compile this share")
    args = parser.parse_args()
    if args.compile is not None:
        compile_share(args.only, *args.compile)
        return
    result, bandwidth = begin(parser)
    compile_all(args.only)
    world = World()
    best, result["sweep"] = sweep(world, args.only)
    measure(args.out, result, world, bandwidth, best)


if __name__ == "__main__":
    main()
