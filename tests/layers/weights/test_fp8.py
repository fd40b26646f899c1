"""Weights in 8-bit floats: what they hold, what they multiply to, what ranks hold of them.

Covers `weights/fp8_arithmetic.py` too. That answers are right is what the engine's tests of quantised bases say.
"""

import pytest
import torch

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.weights import fp8_arithmetic
from multilora.layers.weights.base import Share, Stored, WeightFormat
from multilora.layers.weights.fp8 import Activations, Fp8Blocks, Fp8Rows

KIND = {"device": torch.device("cpu"), "dtype": torch.float32}
ALL = slice(None)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole(outs: int, width: int) -> Share:
    return Share(outs, width, range(outs), range(width))


def test_rounding_loses_an_eighth_of_a_number_at_most() -> None:
    x = random(5, 96)
    x[3] = 0
    q, scale = fp8_arithmetic.quantise(x)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    back = fp8_arithmetic.dequantise(q, scale)
    assert ((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    assert torch.equal(back.abs().amax(1), x.abs().amax(1)), "a row's largest number stays what it is"


def test_the_product_of_scaled_rows_is_what_the_definition_says() -> None:
    """torch has it on the CPU too: the call is the one of a GPU."""
    x, x_scale = fp8_arithmetic.quantise(random(3, 64))
    weight, scale = fp8_arithmetic.quantise(random(48, 64))
    expected = fp8_arithmetic.rows_product(x, x_scale, weight, scale, torch.float32)
    found = fp8_arithmetic.scaled_product(x, x_scale, weight, scale, torch.float32)
    torch.testing.assert_close(found, expected)


def test_a_weight_is_quantised_while_it_is_loaded() -> None:
    weight = Fp8Rows().make(6, 32, **KIND)
    assert weight.tensors(ALL, whole(6, 32)) == {"weight": Stored((6, 32), part=(range(6), range(32)))}
    with pytest.raises(ModelUnsupported, match="no scale"):
        weight.check_filled()
    w, x = random(6, 32), random(4, 32)
    weight.load(slice(2), "weight", w[:2])
    weight.load(slice(2, 6), "weight", w[2:])
    weight.check_filled()
    assert sum(p.numel() * p.element_size() for p in weight.parameters()) == 6 * 32 + 6 * 4
    torch.testing.assert_close(weight.dequantised(ALL), w, atol=0, rtol=1 / 15)
    assert torch.equal(weight.dequantised(slice(2, 4)), weight.dequantised(ALL)[2:4])
    bias = random(6)
    torch.testing.assert_close(weight.matmul(x, bias) - weight.matmul(x, None), bias.expand(4, 6))


def test_activations_may_stay_in_16_bit() -> None:
    for kind in (Fp8Rows(activations=Activations.NONE), Fp8Blocks("scale", (32, 16), Activations.NONE)):
        weight = kind.make(40, 48, **KIND)
        weight.randomise(torch.Generator().manual_seed(0))
        x = random(3, 48)
        assert torch.equal(weight.matmul(x, None), x @ weight.dequantised(ALL).T)
        assert 0.01 < weight.dequantised(ALL).std() < 0.03


def test_a_static_scale_is_needed_and_not_shared() -> None:
    kind = Fp8Rows(("scale",), activations=Activations.STATIC, input_scales=("input_scale",))
    assert not kind.merges([16, 16])
    weight = kind.make(4, 16, **KIND)
    weight.load(ALL, "weight", random(4, 16).to(torch.float8_e4m3fn))
    weight.load(ALL, "scale", torch.tensor(2.0))
    with pytest.raises(ModelUnsupported, match="no input_scale"):
        weight.check_filled()
    weight.load(ALL, "input_scale", torch.tensor([0.5]))
    weight.check_filled()
    with pytest.raises(ModelUnsupported, match="input_scale has 3 numbers for 1 rows"):
        weight.load(ALL, "input_scale", torch.ones(3))


@pytest.mark.parametrize("kind", [Fp8Rows(("scale",), per_row=True), Fp8Blocks("scale", (16, 32))])
def test_a_rank_reads_its_part(kind: WeightFormat) -> None:
    share = Share(48, 128, range(16, 48), range(64, 128))
    found = kind.make(32, 64, **KIND).tensors(ALL, share)
    assert found["weight"].part == (range(16, 48), range(64, 128))
    if isinstance(kind, Fp8Rows):
        assert found["scale"].part == (range(16, 48), range(1))
    else:
        assert (found["scale"].shape, found["scale"].part) == ((3, 4), (range(1, 3), range(2, 4)))


def test_ranks_do_not_divide_a_block() -> None:
    weight = Fp8Blocks("scale").make(64, 128, **KIND)
    with pytest.raises(ConfigError, match="--tp-size: ranks would divide fp8 blocks of 128, in a matrix of 256"):
        weight.tensors(ALL, Share(256, 128, range(64), range(128)))


def test_blocks_of_one_matrix() -> None:
    kind = Fp8Blocks("scale", (16, 16))
    assert kind.merges([32, 16, 8]) and not kind.merges([8, 16])
    weight = kind.make(40, 24, **KIND)
    for rows, value in ((slice(32), 1.0), (slice(32, 40), 3.0)):
        count = rows.stop - (rows.start or 0)
        weight.load(rows, "weight", torch.full((count, 24), 2.0).to(torch.float8_e4m3fn))
        weight.load(slice(rows.start or 0, rows.stop), "scale", torch.full((-(-count // 16), 2), value))
    weight.check_filled()
    assert weight.dequantised(slice(28, 36))[:, 0].tolist() != []
    assert weight.dequantised(slice(32, 40)).unique().tolist() == [6.0]
    assert weight.dequantised(ALL)[:32].unique().tolist() == [2.0]
