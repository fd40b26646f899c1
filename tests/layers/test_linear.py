"""One matrix for several modules, and the one place where LoRA enters."""

import torch
import torch.nn.functional as F
from fakes.layer_context import NoAttention

from multilora.batch import LoraSegment
from multilora.layers.context import ForwardContext
from multilora.layers.linear import GateUp, Linear
from multilora.lora.base import Activation
from multilora.lora.sites import LoraSite, LoraSlice

SITE = LoraSite(
    5, 1, "qkv_proj", 6, (LoraSlice("q_proj", 0, 4), LoraSlice("k_proj", 4, 2), LoraSlice("v_proj", 6, 2))
)


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
    linear = kind(site, bias=bias, device=torch.device("cpu"), dtype=torch.float32)
    for param in linear.parameters():
        param.normal_(generator=torch.Generator().manual_seed(0))
    return linear


def test_without_lora_it_is_a_linear_layer() -> None:
    linear, x = make_linear(bias=True), torch.randn(3, 6)
    assert linear.bias is not None
    y = linear(x, ForwardContext(NoAttention(), None))
    torch.testing.assert_close(y, x @ linear.weight.T + linear.bias)


def test_lora_acts_in_place_on_contiguous_rows_of_its_site() -> None:
    linear, x, lora = make_linear(bias=False), torch.randn(3, 6), Recorder()
    y = linear(x, ForwardContext(NoAttention(), lora))
    [(seen_y, seen_x, site)] = lora.calls
    assert seen_y is y
    assert seen_x is x
    assert site == 5
    assert y.is_contiguous()
    torch.testing.assert_close(y, x @ linear.weight.T + 1)


def test_gate_and_up_come_out_activated() -> None:
    linear, x = make_linear(bias=True, kind=GateUp, site=GATE_UP), torch.randn(3, 6)
    y = F.linear(x, linear.weight, linear.bias)
    torch.testing.assert_close(linear(x, ForwardContext(NoAttention(), None)), F.silu(y[:, :4]) * y[:, 4:])


def test_lora_acts_on_gate_and_up_before_the_activation() -> None:
    linear, x, lora = make_linear(bias=False, kind=GateUp, site=GATE_UP), torch.randn(3, 6), Recorder()
    got = linear(x, ForwardContext(NoAttention(), lora))
    y = x @ linear.weight.T + 1
    torch.testing.assert_close(got, F.silu(y[:, :4]) * y[:, 4:])
    assert [site for _, _, site in lora.calls] == [2]
    assert {name for name, _ in linear.named_parameters()} == {"weight"}


def test_parts_are_views_that_cover_the_matrix() -> None:
    linear = make_linear(bias=True)
    parts = linear.parts()
    assert {name: tuple(p["weight"].shape) for name, p in parts.items()} == {
        "q_proj": (4, 6),
        "k_proj": (2, 6),
        "v_proj": (2, 6),
    }
    for i, part in enumerate(parts.values()):
        part["weight"].fill_(i)
        part["bias"].fill_(i)
    assert linear.weight[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert linear.bias is not None
    assert linear.bias.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


def test_no_gradients() -> None:
    assert not any(p.requires_grad for p in make_linear(bias=True).parameters())
