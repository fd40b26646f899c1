"""One matrix for several modules, and the one place where LoRA enters.

Covers `context.py`, `weights/base.py`, `weights/plain.py`, `weights/joined.py` too.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fakes.layer_context import NoAttention

from multilora.batch import LoraSegment
from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.context import ForwardContext
from multilora.layers.linear import GateUp, Linear
from multilora.layers.weights.base import Share, Stored, Weight, WeightFormat
from multilora.layers.weights.joined import JoinedWeight
from multilora.layers.weights.plain import PLAIN
from multilora.lora.base import Activation
from multilora.lora.sites import LoraSite, LoraSlice

SITE = LoraSite(
    5, 1, "qkv_proj", 6, (LoraSlice("q_proj", 0, 4), LoraSlice("k_proj", 4, 2), LoraSlice("v_proj", 6, 2))
)


def weight_of(linear: Linear) -> torch.Tensor:
    return linear.weight.dequantised(slice(None))


class Recorder:
    """A LoRA backend that adds one to y and remembers what it was given."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def prepare(self, segments: tuple[LoraSegment, ...], num_rows: int, **_: bool) -> None: ...

    def begin(self) -> None:
        assert len(self.calls) == 0, "begin comes before apply"

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        self.calls.append((y, x, site))
        y += 1

    def apply_gated(self, y: torch.Tensor, x: torch.Tensor, site: int, silu_and_mul: Activation) -> torch.Tensor:
        self.apply(y, x, site)
        return silu_and_mul(y)


GATE_UP = LoraSite(2, 1, "gate_up_proj", 6, (LoraSlice("gate_proj", 0, 4), LoraSlice("up_proj", 4, 4)))


def make_linear(bias: bool, kind: type[Linear] = Linear, site: LoraSite = SITE) -> Linear:
    site = replace(site, slices=tuple(replace(s, bias=bias) for s in site.slices))
    linear = kind(site, device=torch.device("cpu"), dtype=torch.float32)
    for param in linear.parameters():
        param.normal_(generator=torch.Generator().manual_seed(0))
    return linear


def test_without_lora_it_is_a_linear_layer() -> None:
    linear, x = make_linear(bias=True), torch.randn(3, 6)
    assert linear.bias is not None
    y = linear(x, ForwardContext(NoAttention(), None))
    torch.testing.assert_close(y, x @ weight_of(linear).T + linear.bias)


def test_lora_acts_in_place_on_contiguous_rows_of_its_site() -> None:
    linear, x, lora = make_linear(bias=False), torch.randn(3, 6), Recorder()
    y = linear(x, ForwardContext(NoAttention(), lora))
    [(seen_y, seen_x, site)] = lora.calls
    assert seen_y is y
    assert seen_x is x
    assert site == 5
    assert y.is_contiguous()
    torch.testing.assert_close(y, x @ weight_of(linear).T + 1)


def test_gate_and_up_come_out_activated() -> None:
    linear, x = make_linear(bias=True, kind=GateUp, site=GATE_UP), torch.randn(3, 6)
    y = F.linear(x, weight_of(linear), linear.bias)
    torch.testing.assert_close(linear(x, ForwardContext(NoAttention(), None)), F.silu(y[:, :4]) * y[:, 4:])


def test_lora_acts_on_gate_and_up_before_the_activation() -> None:
    linear, x, lora = make_linear(bias=False, kind=GateUp, site=GATE_UP), torch.randn(3, 6), Recorder()
    got = linear(x, ForwardContext(NoAttention(), lora))
    y = x @ weight_of(linear).T + 1
    torch.testing.assert_close(got, F.silu(y[:, :4]) * y[:, 4:])
    assert [site for _, _, site in lora.calls] == [2]
    assert {name for name, _ in linear.named_parameters()} == {"weight.data"}


def test_slices_are_filled_and_found_where_they_lie() -> None:
    linear = make_linear(bias=True)
    for i, part in enumerate(linear.site.slices):
        linear.load(part, "weight", torch.full((part.out_features, 6), float(i)))
        linear.load(part, "bias", torch.full((part.out_features,), 10.0 + i))
    assert weight_of(linear)[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert linear.bias is not None
    assert linear.bias.tolist() == [10, 10, 10, 10, 11, 11, 12, 12]
    weight, bias = linear.base_weight(linear.site.slices[1])
    assert torch.equal(weight, torch.ones(2, 6))
    assert bias is not None and bias.tolist() == [11, 11]
    assert make_linear(bias=False).base_weight(SITE.slices[0])[1] is None


class TwoRanks:
    rank, size = 0, 2


class Halved(Weight):
    """A weight that is stored as twice itself in 8 bits, as quantised formats are stored in another form."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.data = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.int8), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.dequantised(slice(None)), bias)

    def dequantised(self, rows: slice) -> torch.Tensor:
        return self.data[rows].float() / 2

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:
        return {"weight": Stored((share.out_features, share.in_features))}

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        self.data[rows] = (2 * tensor).to(torch.int8)

    def randomise(self, generator: torch.Generator) -> None:
        self.data.random_(generator=generator)


class Halving(WeightFormat):
    """Makes them. merged: whether several matrices lie in one weight."""

    name = "halves"

    def __init__(self, merged: bool):
        self._merged = merged

    def make(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype) -> Weight:
        return Halved(out_features, in_features)

    def merges(self, widths: Sequence[int]) -> bool:
        return self._merged


@pytest.mark.parametrize("kinds", ["mmm", "sss", "mmp", "psp"])
def test_other_kinds_of_weights_take_the_place_of_the_plain_one(kinds: str) -> None:
    """Each slice has its own, or they have one together."""
    site = replace(SITE, slices=tuple(replace(s, bias=True) for s in SITE.slices))
    formats = {"m": Halving(True), "s": Halving(False), "p": PLAIN}
    linear = Linear(site, device=torch.device("cpu"), dtype=torch.float32, formats=[formats[kind] for kind in kinds])
    assert isinstance(linear.weight, JoinedWeight) == (kinds != "mmm")
    assert linear.weight.dtype == torch.float32
    assert linear.bias is not None
    linear.bias.copy_(torch.arange(8.0))
    x = torch.randn(3, 6)
    for part in linear.site.slices:
        linear.load(part, "weight", torch.full((part.out_features, 6), 1.5 + part.offset))
    y = linear(x, ForwardContext(NoAttention(), None))
    want = torch.tensor([1.5] * 4 + [5.5] * 2 + [7.5] * 2)
    torch.testing.assert_close(y, x.sum(dim=1, keepdim=True) * want + linear.bias)
    assert torch.equal(linear.base_weight(linear.site.slices[2])[0], torch.full((2, 6), 7.5))
    assert torch.equal(weight_of(linear), want[:, None].expand(8, 6))
    linear.weight.randomise(torch.Generator().manual_seed(0))
    assert not torch.equal(weight_of(linear), want[:, None].expand(8, 6))


def test_what_a_format_does_not_do_is_refused() -> None:
    kind = {"device": torch.device("cpu"), "dtype": torch.float32}
    transposed = replace(SITE, slices=tuple(replace(s, transposed=True) for s in SITE.slices))
    with pytest.raises(ModelUnsupported, match=r"q_proj is held as \[in, out\], which weights in halves cannot be"):
        Linear(transposed, formats=[Halving(True)] * 3, **kind)
    with pytest.raises(ConfigError, match="--tp-size 2: ranks do not divide weights in halves"):
        Linear(SITE, formats=[Halving(True)] * 3, group=TwoRanks(), **kind)  # type: ignore[arg-type]


def test_no_gradients() -> None:
    assert not any(p.requires_grad for p in make_linear(bias=True).parameters())
