"""The FP8 product of experts against its definition: in Triton's interpreter, and on a GPU if there is one."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from compilers import compile_elsewhere

from multilora.layers import triton_fp8_grouped as fused
from multilora.layers.weights import fp8_arithmetic as defined

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = torch.device("cuda" if CUDA else "cpu")
COUNTS = [0, 1, 5, 0, 37, 2, 0]
BLOCKS = {
    "as chosen": None,
    "weight first": fused.Fp8GroupedBlocks(16, 64, 64, swapped=True),
    "rows first": fused.Fp8GroupedBlocks(16, 32, 32, swapped=False),
    "tall": fused.Fp8GroupedBlocks(64, 32, 128, swapped=False),
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def error_of(
    counts: list[int], outs: int, width: int, block: tuple[int, int] | None, blocks: fused.Fp8GroupedBlocks | None
) -> float:
    """What the kernel differs by from the definition, of its largest; after the rows of experts come three more."""
    count = len(counts)
    x, x_scale = defined.quantise(random(sum(counts) + 3, width), block and block[1])
    weight = defined.saturated(100 * random(count, outs, width))
    high, wide = block or (1, width)
    scale = random(count, -(-outs // high), -(-width // wide)).abs()
    ends = torch.tensor(counts).cumsum(0).int()
    expected = defined.grouped_product(x, x_scale, weight, scale, ends, block, torch.float32)
    given = (t.to(DEVICE) for t in (x, x_scale, weight, scale, ends))
    found = fused.grouped_product(*given, block, torch.float32, blocks)
    mine, theirs = found.cpu()[: sum(counts)], expected[: sum(counts)]
    return float((mine - theirs).norm() / theirs.norm())


CLOSE = 1e-3 if CUDA else 1e-6  # Hopper rounds within 32 columns


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("outs", "width"), [(64, 256), (40, 200)])
def test_a_scale_for_each_row(outs: int, width: int, blocks: str) -> None:
    assert error_of(COUNTS, outs, width, None, BLOCKS[blocks]) < CLOSE


@pytest.mark.parametrize("columns", [32, 64, 128, 256])
@pytest.mark.parametrize(("outs", "width", "high"), [(64, 256, 32), (96, 200, 40)])
def test_a_scale_for_each_block(outs: int, width: int, high: int, columns: int) -> None:
    """Blocks that a matrix is no multiple of, too; weights as the first operand and as the second."""
    for blocks in (None, fused.Fp8GroupedBlocks(64, 32, columns, swapped=False, stages=2)):
        assert error_of(COUNTS, outs, width, (high, columns), blocks) < CLOSE


@pytest.mark.parametrize("counts", [[40], [1, 0, 0], [300, 1], [0, 130, 16, 0]])
def test_however_rows_are_spread(counts: list[int]) -> None:
    """One expert with all of them, experts without any, more tiles than experts."""
    assert error_of(counts, 32, 64, None, None) < CLOSE
    assert error_of(counts, 64, 256, (32, 128), None) < CLOSE


def test_there_are_tiles_for_the_worst_case() -> None:
    for height in (2, 3):
        for rows in range(8):
            for first in range(rows + 1):
                for second in range(rows - first + 1):
                    counts = (first, second, rows - first - second)
                    assert sum(-(-n // height) for n in counts) <= fused.most_tiles(rows, 3, height)


def test_blocks_by_rows_and_columns() -> None:
    large, small = 227 << 10, 99 << 10
    assert fused.blocks_of(8, 128, None, large) == fused.FEW
    assert fused.blocks_of(1664, 128, None, large) == fused.blocks_of(1 << 16, 128, 128, large) == fused.MANY
    assert fused.blocks_of(1 << 16, 128, 256, large) == replace(fused.MANY, columns=256, stages=2)
    assert fused.blocks_of(1 << 16, 128, 256, small) == replace(fused.MANY, columns=256, outs=128, stages=2)
    for shared in (large, small):
        for rows in (8, 1664, 1 << 16):
            for columns in (None, *defined.KERNEL_COLUMNS):
                chosen = fused.blocks_of(rows, 128, columns, shared)
                assert 2 <= chosen.stages <= shared // chosen.stage_bytes


CASES = [f"{name} {columns} bf16 {capability}" for capability in (89, 90, 120) for name in ("FEW", "MANY")
         for columns in (0, 128)]  # fmt: skip
CASES += ["FEW 32 fp32 89", "MANY 64 fp16 90", "MANY 32 bf16 90", "FEW 256 bf16 90", "MANY 256 bf16 89"]


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_and_fits_in_them() -> None:
    lines = compile_elsewhere("compile_experts.py", lines="\n".join(CASES))
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [" ".join(one["case"]) for one in found] == CASES
    assert [one for one in found if not 0 < one["shared"] <= one["most"]] == []


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("block", [None, (128, 128)])
def test_one_graph_serves_whatever_experts_rows_take(block: tuple[int, int] | None) -> None:
    counts = [0, 3, 20, 0, 40]
    x, x_scale = defined.quantise(random(63, 256), block and block[1])
    weight = defined.saturated(100 * random(5, 128, 256))
    scale = random(5, 1 if block else 128, 2 if block else 1).abs()
    ends = torch.tensor(counts).cumsum(0).int()
    given = [t.to(DEVICE) for t in (x, x_scale, weight, scale, ends)]
    fused.grouped_product(*given, block, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused.grouped_product(*given, block, torch.bfloat16)
    for other in (counts, [63, 0, 0, 0, 0], [10, 10, 10, 10, 23]):
        ends = torch.tensor(other).cumsum(0).int()
        given[-1].copy_(ends)
        graph.replay()
        expected = defined.grouped_product(x, x_scale, weight, scale, ends, block, torch.float32)
        assert (out.cpu().float() - expected).norm() < 1e-2 * expected.norm()
