"""Products of a few rows with quantised weights and with experts', bound by reading them: torch's and ours.

    python -m bench.few_rows [--only fp8 experts fp8_experts int4_experts] [--sweep] [--out FILE]

FP8 with a scale for each row, Llama-3.1-8B's four shapes; the experts of Qwen3-30B-A3B, each row on 8 random ones of
128, in 16 bit, in FP8 by rows and by blocks of 128 x 128, and in 4 bit in groups of 128 inputs. All in bf16, in CUDA
graphs over weights enough to miss the L2 cache. --sweep tries other block sizes, from which the committed ones were
taken.
The limit is the bytes of the weights read over the read bandwidth measured in the same run. Last line: JSON.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from bench.common import environment, finish, read_bandwidth, say

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
EXPERTS, TOP_K, SITES = 128, 8, {"gate_up": (1536, 2048), "down": (2048, 768)}
ROWS = {"fp8": (1, 2, 8, 16, 32, 64, 128), "experts": (1, 8, 32, 64, 128, 256, 512)}
ROWS["fp8_experts"] = ROWS["int4_experts"] = (*ROWS["experts"], 2048, 8192)
COLD_BYTES = 256 << 20
DEVICE = torch.device("cuda")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rows", nargs="+", type=int, help="instead of all of them")
    parser.add_argument("--sweep", action="store_true", help="try other block sizes")
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    result: dict[str, Any] = environment("triton")
    bandwidth = read_bandwidth(DEVICE, 1 << 32)
    result["read_bandwidth_tb_s"] = bandwidth / 1e12
    result["rows"] = []
    for part in args.only:
        for name, rows, nbytes, ways in PARTS[part](args.rows or ROWS[part], args.sweep):
            limit = nbytes / bandwidth * 1e6
            times = {how: microseconds(run, nbytes) for how, run in ways()}
            best = min(times, key=lambda how: times[how])
            say(f"{part} {name}, {rows} rows: limit {limit:.1f} us, best {best}")
            for how, taken in sorted(times.items(), key=lambda pair: pair[1])[:8]:
                say(f"    {taken:8.1f} us  {limit / taken:5.0%} of the limit  {how}")
            result["rows"].append({"part": part, "site": name, "rows": rows, "limit_us": limit, "us": times})
    finish(result, args.out)
    return 0


Run = Callable[[int], Any]
"""Computes the product with one of `copies` weights."""
Case = tuple[str, int, int, Callable[[], Iterator[tuple[str, Run]]]]
"""Site, rows, the bytes of weights that are read, and the ways to compute it."""


def copies(nbytes: int) -> int:
    """How many weights of this size miss the L2 cache when they are read in turns."""
    return max(1, -(-COLD_BYTES // nbytes))


def fp8(counts: list[int], sweep: bool) -> Iterator[Case]:
    from multilora.layers import triton_fp8_rows as few
    from multilora.layers.weights.fp8_arithmetic import quantise, scaled_product

    for name, (outs, width) in SHAPES.items():
        number = copies(outs * width)
        weights = [quantise(torch.randn(outs, width, device=DEVICE)) for _ in range(number)]
        for rows in counts:
            x = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)

            def ways(x: torch.Tensor = x, weights: Any = weights) -> Iterator[tuple[str, Run]]:
                bf16 = torch.bfloat16
                yield "torch", lambda i: scaled_product(*quantise(x), *weights[i], bf16)
                yield "few rows", lambda i: few.few_rows_product(*quantise(x), *weights[i], bf16)
                for one in _swept(few.RowBlocks, len(x)) if sweep else ():
                    for splits in (1, 2, 4) if len(weights[0][0]) < few.WIDE else (1,):
                        blocks = replace(one, splits=splits)
                        yield (
                            str(blocks),
                            lambda i, b=blocks: few.few_rows_product(*quantise(x), *weights[i], bf16, b),
                        )

            yield name, rows, outs * width, ways


def experts(counts: list[int], sweep: bool) -> Iterator[Case]:
    from multilora.layers import triton_grouped as grouped
    from multilora.layers.experts import sort_by_expert

    for name, (outs, width) in SITES.items():
        weight = torch.randn(EXPERTS, outs, width, device=DEVICE, dtype=torch.bfloat16)
        for tokens in counts:
            g = torch.Generator().manual_seed(tokens)
            taken = torch.rand(tokens, EXPERTS, generator=g).topk(TOP_K).indices.to(DEVICE)
            rows = sort_by_expert(taken, EXPERTS)
            x = torch.randn(tokens * TOP_K, width, device=DEVICE, dtype=torch.bfloat16)

            def ways(
                x: torch.Tensor = x, ends: torch.Tensor = rows.ends, weight: torch.Tensor = weight
            ) -> Iterator[tuple[str, Run]]:
                yield "torch", lambda _: F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
                yield "few rows", lambda _: grouped.grouped_product(x, weight, ends)
                for blocks in _swept(grouped.GroupedBlocks, 16, 2) if sweep else ():
                    yield str(blocks), lambda _, b=blocks: grouped.grouped_product(x, weight, ends, b)

            yield name, tokens, len(taken.unique()) * outs * width * 2, ways


def fp8_experts(counts: list[int], sweep: bool) -> Iterator[Case]:
    """Beside the product in 16 bit. What is multiplied is rounded in both."""
    from multilora.layers import triton_fp8_grouped as grouped
    from multilora.layers import triton_grouped
    from multilora.layers.experts import sort_by_expert
    from multilora.layers.weights.fp8_arithmetic import quantise

    for name, (outs, width) in SITES.items():
        wide = torch.randn(EXPERTS, outs, width, device=DEVICE, dtype=torch.bfloat16)
        flat, by_row = quantise(wide.flatten(0, 1))
        weight, by_row = flat.view(EXPERTS, outs, width), by_row.view(EXPERTS, outs, 1)
        by_block = torch.ones(EXPERTS, -(-outs // 128), -(-width // 128), device=DEVICE)
        for tokens in counts:
            g = torch.Generator().manual_seed(tokens)
            taken = torch.rand(tokens, EXPERTS, generator=g).topk(TOP_K).indices.to(DEVICE)
            rows = sort_by_expert(taken, EXPERTS)
            x = torch.randn(tokens * TOP_K, width, device=DEVICE, dtype=torch.bfloat16)

            def product(
                x: torch.Tensor,
                ends: torch.Tensor,
                weight: torch.Tensor,
                scale: torch.Tensor,
                block: tuple[int, int] | None,
                blocks: Any = None,
            ) -> torch.Tensor:
                q, x_scale = quantise(x, block and block[1])
                return grouped.grouped_product(q, x_scale, weight, scale, ends, block, x.dtype, blocks)

            def ways(
                x: torch.Tensor = x,
                ends: torch.Tensor = rows.ends,
                wide: torch.Tensor = wide,
                weight: torch.Tensor = weight,
                by_row: torch.Tensor = by_row,
                by_block: torch.Tensor = by_block,
                product: Callable[..., torch.Tensor] = product,
            ) -> Iterator[tuple[str, Run]]:
                yield "bf16, torch", lambda _: F.grouped_mm(x, wide.transpose(1, 2), offs=ends)
                yield "bf16, few rows", lambda _: triton_grouped.grouped_product(x, wide, ends)
                for how, scale, block in (("by rows", by_row, None), ("in blocks", by_block, (128, 128))):
                    run = partial(product, x, ends, weight, scale, block)
                    yield how, lambda _, run=run: run()
                    for blocks in _swept_experts(grouped, block is not None) if sweep else ():
                        yield f"{how}, {blocks}", lambda _, run=run, b=blocks: run(b)

            yield name, tokens, len(taken.unique()) * outs * width, ways


def _swept_experts(grouped: Any, in_blocks: bool) -> Iterator[Any]:
    """Those chosen, and with other outputs, columns, warps and stages."""
    for chosen in (grouped.FEW, grouped.MANY):
        for outs in (32, 64, 128, 256):
            for columns in (128,) if in_blocks else (64, 128, 256):
                for warps in (4, 8):
                    one = replace(chosen, outs=outs, columns=columns, warps=warps)
                    if not (chosen.swapped and outs < 64) and one.stage_bytes * 2 <= 200 << 10:
                        yield replace(one, stages=min(6, (200 << 10) // one.stage_bytes))


def int4_experts(counts: list[int], sweep: bool) -> Iterator[Case]:
    """Beside the product in 16 bit."""
    from multilora.layers import triton_grouped
    from multilora.layers import triton_int4_grouped as grouped
    from multilora.layers.experts import sort_by_expert

    group = 128
    for name, (outs, width) in SITES.items():
        wide = torch.randn(EXPERTS, outs, width, device=DEVICE, dtype=torch.bfloat16)
        packed = torch.randint(0, 256, (EXPERTS, outs, width // 2), device=DEVICE, dtype=torch.uint8)
        scales = torch.full((EXPERTS, width // group, outs, 2), 8.0, device=DEVICE, dtype=torch.bfloat16)
        for tokens in counts:
            g = torch.Generator().manual_seed(tokens)
            taken = torch.rand(tokens, EXPERTS, generator=g).topk(TOP_K).indices.to(DEVICE)
            rows = sort_by_expert(taken, EXPERTS)
            x = torch.randn(tokens * TOP_K, width, device=DEVICE, dtype=torch.bfloat16)

            def ways(
                x: torch.Tensor = x,
                ends: torch.Tensor = rows.ends,
                wide: torch.Tensor = wide,
                packed: torch.Tensor = packed,
                scales: torch.Tensor = scales,
            ) -> Iterator[tuple[str, Run]]:
                yield "bf16, torch", lambda _: F.grouped_mm(x, wide.transpose(1, 2), offs=ends)
                yield "bf16, few rows", lambda _: triton_grouped.grouped_product(x, wide, ends)
                yield "4 bit", lambda _: grouped.grouped_product(x, packed, scales, ends)
                for blocks in _swept_int4(grouped) if sweep else ():
                    yield str(blocks), lambda _, b=blocks: grouped.grouped_product(x, packed, scales, ends, b)

            yield name, tokens, len(taken.unique()) * outs * (width // 2 + 4 * width // group), ways


def _swept_int4(grouped: Any) -> Iterator[Any]:
    """Those chosen, and with other outputs, columns, warps and stages."""
    for chosen in (grouped.FEW, grouped.MANY):
        for outs in (64, 128, 256):
            for columns in (64, 128):
                for warps in (4, 8):
                    for stages in (3, 5):
                        yield replace(chosen, outs=outs, columns=columns, warps=warps, stages=stages)


PARTS = {"fp8": fp8, "experts": experts, "fp8_experts": fp8_experts, "int4_experts": int4_experts}

SWEPT = {  # rows: (outs, columns in bytes, stages, warps, swapped)
    16: (
        (64, 128, 6, 4, True),
        (64, 256, 4, 4, True),
        (64, 512, 3, 4, True),
        (128, 128, 5, 4, True),
        (128, 256, 3, 8, True),
        (64, 512, 3, 8, False),
    ),
    64: (
        (32, 128, 5, 4, False),
        (32, 256, 4, 4, False),
        (64, 128, 5, 4, False),
        (64, 256, 3, 4, False),
        (128, 128, 4, 8, False),
        (128, 128, 4, 4, True),
    ),
}


def _swept(make: Any, rows: int, itemsize: int = 1) -> Iterator[Any]:
    tall = 16 if rows <= 16 else 64
    for outs, columns, stages, warps, swapped in SWEPT[tall]:
        yield make(tall, outs, columns // itemsize, swapped=swapped, warps=warps, stages=stages)


def microseconds(run: Run, nbytes: int) -> float:
    """Median of one product, over graphs of several; infinite where the block sizes don't fit the device."""
    number = copies(nbytes)
    try:
        run(0)
        torch.cuda.synchronize()
    except Exception as e:  # noqa: BLE001 - Triton's errors of too large blocks have no common base
        say(f"      {type(e).__name__}: {str(e)[:100]}")
        return float("inf")
    graph = torch.cuda.CUDAGraph()
    each = max(number, 8)
    with torch.cuda.graph(graph):
        for i in range(each):
            run(i % number)
    graph.replay()
    taken = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / each)
    return median(taken)


if __name__ == "__main__":
    sys.exit(main())
