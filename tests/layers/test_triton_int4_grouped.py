"""The 4-bit product of experts against its definition: in Triton's interpreter, and on a GPU if there is one."""

import json

import pytest
import torch

pytest.importorskip("triton")

from compilers import compile_elsewhere

from multilora.layers import triton_int4_grouped as fused
from multilora.layers.weights import int4_grouped as defined

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # the interpreter's bf16 products are wrong
CLOSE = 1e-2 if CUDA else 1e-6
COUNTS = [0, 1, 5, 0, 37, 2, 0]
BLOCKS = {
    "as chosen": None,
    "tall": fused.Int4GroupedBlocks(64, 32, 32),
    "wide": fused.Int4GroupedBlocks(16, 128, 32),
}


def made(count: int, outs: int, width: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed numbers and scales of so many experts."""
    g = torch.Generator().manual_seed(outs + width + group)
    numbers = torch.randint(0, 16, (count * outs, width), dtype=torch.int32, generator=g)
    scales = torch.rand(count, width // group, outs, 2, generator=g) - 0.5
    scales[..., 1] = torch.randint(0, 16, scales.shape[:-1], generator=g)
    return defined.pack(numbers).view(count, outs, -1), scales.bfloat16()


def error_of(
    counts: list[int], outs: int, width: int, group: int, blocks: fused.Int4GroupedBlocks | None = None
) -> float:
    """What the kernel differs by from the definition, of its norm; after the rows of experts come three more."""
    packed, scales = made(len(counts), outs, width, group)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts) + 3, width, generator=g).bfloat16().float()
    ends = torch.tensor(counts).cumsum(0).int()
    expected = defined.grouped_product(x, packed, scales.float(), ends)[: sum(counts)]
    given = (t.to(DEVICE) for t in (x.to(DTYPE), packed, scales, ends))
    found = fused.grouped_product(*given, blocks).cpu().float()[: sum(counts)]
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("outs", "width", "group"), [(64, 256, 64), (40, 192, 32), (24, 96, 96)])
def test_every_row_meets_its_expert(outs: int, width: int, group: int, blocks: str) -> None:
    """Outputs that are no multiple of a block's, too; one group alone."""
    assert error_of(COUNTS, outs, width, group, BLOCKS[blocks]) < CLOSE


@pytest.mark.parametrize("counts", [[40], [1, 0, 0], [300, 1], [0, 130, 16, 0]])
def test_however_rows_are_spread(counts: list[int]) -> None:
    """One expert with all of them, experts without any, more tiles than experts."""
    assert error_of(counts, 32, 64, 32) < CLOSE
    assert error_of(counts, 64, 256, 128) < CLOSE


def test_blocks_by_rows_and_groups() -> None:
    assert fused.blocks_of(8, 128, 128) == fused.FEW
    assert fused.blocks_of(1 << 16, 128, 64) == fused.MANY
    for group in (32, 64, 96, 128, 160, 256, 768, 2048):
        for rows in (8, 1664, 1 << 16):
            columns = fused.blocks_of(rows, 128, group).columns
            assert group % columns == 0 and columns >= 32


CASES = [f"{name} {group} {capability}" for capability in (80, 89, 90, 120) for name in ("FEW", "MANY")
         for group in (128, 32)]  # fmt: skip


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_and_fits_in_them() -> None:
    """Into shared memory and registers, and its loads are copies that run ahead."""
    lines = compile_elsewhere("compile_int4_experts.py", lines="\n".join(CASES))
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [" ".join(one["case"]) for one in found] == CASES
    assert [one for one in found if not 0 < one["shared"] <= one["most"]] == []
    assert [one for one in found if one["spilled"] or not one["copies"]] == []


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("group", [32, 128])
def test_one_graph_serves_whatever_experts_rows_take(group: int) -> None:
    counts = [0, 3, 20, 0, 40]
    packed, scales = made(5, 128, 256, group)
    x = torch.randn(63, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    ends = torch.tensor(counts).cumsum(0).int()
    given = [t.to(DEVICE) for t in (x, packed, scales, ends)]
    fused.grouped_product(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused.grouped_product(*given)
    for other in (counts, [63, 0, 0, 0, 0], [10, 10, 10, 10, 23]):
        ends = torch.tensor(other).cumsum(0).int()
        given[-1].copy_(ends)
        graph.replay()
        expected = defined.grouped_product(x.float(), packed, scales.float(), ends)
        assert (out.cpu().float() - expected).norm() < CLOSE * expected.norm()
