"""One matrix for several modules, and the one place where LoRA enters.

Covers `context.py`, `weight.py` too.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from fakes.layer_context import NoAttention

from multilora.batch import LoraSegment
from multilora.layers.context import ForwardContext
from multilora.layers.linear import GateUp, Linear
from multilora.layers.weight import Weight
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

    def prepare(self, segments: tuple[LoraSegment, ...], num_rows: int) -> None: ...

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

    def load(self, rows: slice, tensor: torch.Tensor) -> None:
        self.data[rows] = (2 * tensor).to(torch.int8)


def test_another_kind_of_weight_takes_the_place_of_the_plain_one() -> None:
    linear, x = make_linear(bias=True), torch.randn(3, 6)
    linear.weight = Halved(8, 6)
    for part in linear.site.slices:
        linear.load(part, "weight", torch.full((part.out_features, 6), 1.5 + part.offset))
    y = linear(x, ForwardContext(NoAttention(), None))
    want = torch.tensor([1.5] * 4 + [5.5] * 2 + [7.5] * 2)
    torch.testing.assert_close(y, x.sum(dim=1, keepdim=True) * want + linear.bias)
    assert torch.equal(linear.base_weight(linear.site.slices[2])[0], torch.full((2, 6), 7.5))


def test_no_gradients() -> None:
    assert not any(p.requires_grad for p in make_linear(bias=True).parameters())
