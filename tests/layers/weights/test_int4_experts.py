"""Experts in packed integers: what they hold, what they multiply to beside the checkpoint's own, what stays packed.

Covers `weights/int4_grouped.py` too.
"""

import logging
from typing import Any

import packed_integers
import pytest
import torch
from packed_integers import Integers, pack_awq, pack_compressed, pack_gptq

from multilora.errors import ModelUnsupported
from multilora.layers.experts import sort_by_expert
from multilora.layers.weights import int4_grouped, integer_format
from multilora.layers.weights.awq import Awq
from multilora.layers.weights.base import ExpertsWeight, Share
from multilora.layers.weights.compressed_tensors import PackedIntegers
from multilora.layers.weights.gptq import Gptq
from multilora.layers.weights.int4_experts import Int4Experts
from multilora.layers.weights.integer_format import IntegerFormat
from multilora.layers.weights.unpacked import UnpackedExperts

CPU, META = torch.device("cpu"), torch.device("meta")
BF16 = {"device": CPU, "dtype": torch.bfloat16}
EXPERTS, PARTS, WIDTH = 4, (32, 16), 192
LAYOUTS: dict[str, tuple[IntegerFormat, dict[str, Any], Any]] = {
    "awq": (Awq(32), {"size": 32}, pack_awq),
    "awq, odd groups": (Awq(96), {"size": 96}, pack_awq),
    "gptq": (Gptq(4, 64, 1), {"size": 64}, lambda i: pack_gptq(i, 4)),
    "compressed, one group": (
        PackedIntegers(4, None, symmetric=True, ordered=True),
        {"size": WIDTH, "symmetric": True},
        lambda i: pack_compressed(i, 4, symmetric=True, in_order=True),
    ),
    "compressed, not symmetric": (
        PackedIntegers(4, 32, symmetric=False, ordered=True),
        {"size": 32},
        lambda i: pack_compressed(i, 4, symmetric=False, in_order=True),
    ),
}


def integers(outs: int, seed: int, *, size: int, symmetric: bool = False) -> Integers:
    weight = torch.randn(outs, WIDTH, generator=torch.Generator().manual_seed(seed))
    found = packed_integers.rounded(weight, 4, size, symmetric=symmetric)
    return Integers(found.numbers, found.zeros, found.scales.bfloat16().half(), found.group)


def filled(layout: str, **kind: Any) -> tuple[ExpertsWeight, list[torch.Tensor]]:
    """Experts of which every second is loaded back to front, and their matrices; scales are bf16's."""
    form, how, pack = LAYOUTS[layout]
    weight, matrices = form.make_experts(EXPERTS, PARTS, WIDTH, **kind), []
    for expert in range(EXPERTS):
        made = [integers(outs, 10 * expert + i, **how) for i, outs in enumerate(PARTS)]
        start = weight.rows_of(expert).start
        for ints, first in zip(made, (0, PARTS[0]), strict=True):
            outs = len(ints.numbers)
            rows = slice(start + first, start + first + outs)
            tensors = pack(ints)
            stored = weight.tensors(rows, Share(outs, WIDTH, range(outs), range(WIDTH)))
            assert tensors.keys() == {name for name, one in stored.items() if not one.optional}
            for name in sorted(tensors, reverse=bool(expert % 2)):
                weight.load(rows, name, tensors[name].contiguous())
        matrices.append(torch.cat([ints.weight for ints in made]))
    return weight, matrices


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_expert_is_the_one_of_the_checkpoint(layout: str) -> None:
    """Bit for bit in bf16, which scales are rounded to, and so are products."""
    weight, matrices = filled(layout, **BF16)
    assert isinstance(weight, Int4Experts)
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    taken = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0], [1, 0], [3, 1], [0, 3], [1, 3], [0, 1]])  # nobody takes 2
    rows = sort_by_expert(taken, EXPERTS)
    y = weight.grouped_matmul(x[rows.tokens], rows)
    assert (y.dtype, y.shape) == (torch.bfloat16, (18, sum(PARTS)))
    for expert, matrix in enumerate(matrices):
        assert torch.equal(weight.dequantised(weight.rows_of(expert)), matrix.bfloat16())
        mine = rows.experts == expert
        assert torch.equal(y[mine], x[rows.tokens[mine]] @ matrix.bfloat16().T)
    whole = torch.cat(matrices).bfloat16()
    assert torch.equal(weight.matmul(x, None), torch.nn.functional.linear(x, whole))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_fp32_they_are_dequantised(layout: str) -> None:
    weight, matrices = filled(layout, device=CPU, dtype=torch.float32)
    assert isinstance(weight, UnpackedExperts) and not weight.capturable
    rows = sort_by_expert(torch.tensor([[1], [0], [3]]), EXPERTS)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    y = weight.grouped_matmul(x[rows.tokens], rows)
    for expert, matrix in enumerate(matrices):
        assert torch.equal(weight.dequantised(weight.rows_of(expert)), matrix)
        mine = rows.experts == expert
        torch.testing.assert_close(y[mine], x[rows.tokens[mine]] @ matrix.T)


def test_numbers_of_32_inputs_lie_in_16_bytes() -> None:
    numbers = torch.randint(0, 16, (3, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = int4_grouped.pack(numbers)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 32))
    for byte, low in ((0, 0), (15, 15), (16, 32), (31, 47)):
        assert torch.equal(packed[:, byte].int(), numbers[:, low] + 16 * numbers[:, low + 16])
    assert torch.equal(int4_grouped.numbers_of(packed).int(), numbers)


def test_they_are_held_in_4_bit() -> None:
    """With four bytes for each output and group of inputs."""
    weight = Awq(32).make_experts(EXPERTS, PARTS, WIDTH, **BF16)
    assert sum(p.nbytes for p in weight.parameters()) == EXPERTS * sum(PARTS) * (WIDTH // 2 + 4 * WIDTH // 32)
    weight.randomise(torch.Generator().manual_seed(0))
    for expert in range(EXPERTS):
        assert 0.01 < weight.dequantised(weight.rows_of(expert)).float().std() < 0.03


@pytest.mark.parametrize(
    ("kind", "width", "dtype", "why"),
    [
        (Awq(32), 64, torch.float16, "packed products are in bfloat16, the model is in float16"),
        (Awq(48), 96, torch.bfloat16, "packed products of experts take groups of a multiple of 32 inputs, it has 48"),
        (Gptq(4, 64, 1), 96, torch.bfloat16, "96 inputs are not whole groups of 64"),
        (Gptq(8, 32, 1), 64, torch.bfloat16, "8 bits do not stay packed"),
        (
            Gptq(4, 32, 1, ordered=False),
            64,
            torch.bfloat16,
            "the inputs of a group need not be neighbours (desc_act), and each expert has an order of its own",
        ),
    ],
)
def test_the_log_says_what_does_not_stay_packed(
    kind: IntegerFormat, width: int, dtype: torch.dtype, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    integer_format._say.cache_clear()
    with caplog.at_level(logging.INFO):
        weight = kind.make_experts(2, (16,), width, device=META, dtype=dtype)
        packed = Awq(32).make_experts(2, (16,), 64, device=META, dtype=torch.bfloat16)
    assert isinstance(weight, UnpackedExperts) and isinstance(packed, Int4Experts)
    assert caplog.messages == [
        f"experts in {kind.name}: held dequantised, with the memory of 16 bit: {why}",
        "experts in awq in 4 bit: held packed",
    ]


def test_old_gpus_hold_them_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    said = int4_grouped.obstacle(torch.device("cuda"), torch.bfloat16, 64, 32)
    assert said == "packed products need a GPU of compute capability 8.0 or later"


def test_what_a_layout_has_no_words_for_is_named() -> None:
    with pytest.raises(ModelUnsupported, match="awq outputs of 20: expected a multiple of 8"):
        Awq(32).make_experts(2, (16, 20), 64, **BF16)
    with pytest.raises(ModelUnsupported, match="gptq inputs of 60: expected a multiple of 8"):
        Gptq(4, None, 1).make_experts(2, (16,), 60, **BF16)
