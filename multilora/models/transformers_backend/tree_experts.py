"""Experts of transformers' mixtures, computed as those of native ones are: rows sorted by expert, grouped products.

The parameters stay in the tree under transformers' names and in its shapes. Routers stay transformers' own, and so
does what an expert does between its two products, unless it is silu(gate) · up. Which mixtures add up like this is
found by running transformers' code on stand-ins. Called by `probe.py`, `model.py` and `weights.py`.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from multilora.batch import ExpertRows
from multilora.layers.activation import SiluAndMul
from multilora.layers.experts import combine, sort_by_expert
from multilora.layers.grouped_matmul import grouped_product
from multilora.lora.base import LoraBackend
from multilora.lora.sites import LoraSite
from multilora.models.transformers_backend.common_parts import BROKEN, SCALES
from multilora.models.transformers_backend.modules import TreeStep

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The weights of all experts of a mixture, as transformers names them."""
BIAS = "_bias"
"""What the names of their biases have behind these."""

EXPERTS, TOP_K, TOKENS, HIDDEN, INNER = 3, 2, 7, 16, 8
"""Sizes of a stand-in."""


class TreeExperts:
    """The forward pass of a mixture's experts, with the step's adapters.

    experts: transformers' module, which holds the weights: [experts, out, in], or [experts, in, out] where it says
    `is_transposed`. sites: by the name of the weight; empty: adapters do not act here. gate: what lies between the
    products, [rows, 2 · inner] to [rows, inner]. adds_bias: down's bias is added here. Where ranks divide each
    expert, the weights are a part of it, and the outputs are a share, LoRA's included, of a sum: one rank adds that
    bias.
    """

    def __init__(
        self,
        experts: Any,
        sites: Mapping[str, LoraSite],
        step: TreeStep,
        gate: Callable[[torch.Tensor], torch.Tensor],
        *,
        adds_bias: bool = True,
    ):
        self._experts = experts
        self._sites = sites
        self._step = step
        self._gate = gate
        self._biased = (GATE_UP, DOWN)[: 1 + adds_bias] if experts.has_bias else ()

    def forward(self, x: torch.Tensor, taken: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x: [tokens, hidden], the step's rows; taken: int64 [tokens, top_k], which experts each takes, and their
        weights. Returns [tokens, hidden]."""
        return self.add_up(x, taken, weights, self._step.ctx.lora if self._sites else None)

    def add_up(
        self, x: torch.Tensor, taken: torch.Tensor, weights: torch.Tensor, lora: LoraBackend | None
    ) -> torch.Tensor:
        """The same with these adapters."""
        segments = lora.expert_segments() if lora is not None else None
        rows = sort_by_expert(taken.contiguous(), len(weight_of(self._experts, DOWN)), segments)
        both = self._product(GATE_UP, x[rows.tokens], rows, lora)
        y = self._product(DOWN, self._gate(both).contiguous(), rows, lora)
        return combine(y, rows, weights.contiguous())

    def _product(self, name: str, x: torch.Tensor, rows: ExpertRows, lora: LoraBackend | None) -> torch.Tensor:
        y = grouped_product(x, weight_of(self._experts, name), rows)
        if name in self._biased:
            y += getattr(self._experts, name + BIAS)[rows.experts]
        if lora is not None and rows.segments is not None:
            lora.apply_experts(y, x, self._sites[name].index, rows)
        return y


def weight_of(experts: Any, name: str) -> torch.Tensor:
    """One of a mixture's weights as [experts, out, in], a view."""
    weight: torch.Tensor = getattr(experts, name)
    return weight.transpose(1, 2) if experts.is_transposed else weight


def lay_by_outputs(experts: Any) -> None:
    """Have the weights of a mixture lie in memory as [experts, out, in], which is what kernels read. Those that have
    another order, which are on the meta device, are replaced; names and shapes stay."""
    for name in (GATE_UP, DOWN):
        weight = weight_of(experts, name)
        if not weight.is_contiguous():
            laid = torch.empty_like(weight, memory_format=torch.contiguous_format).transpose(1, 2)
            setattr(experts, name, nn.Parameter(laid, requires_grad=False))


def fill_laid_out(param: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy a tensor into a parameter of its shape, expert by expert where their orders in memory differ: of what is
    copied so, a device holds a second time what is copied at once."""
    if param.is_contiguous():
        param.copy_(tensor)
        return
    for own, given in zip(param, tensor, strict=True):
        own.copy_(given)


@torch.inference_mode()
def adds_up_alike(experts: Any) -> bool:
    """Whether a mixture of transformers, which may be on the meta device, computes what `TreeExperts` does."""
    named = dict(experts.named_parameters())
    biases = [GATE_UP + BIAS, DOWN + BIAS] if experts.has_bias else []
    if sorted(named) != sorted([GATE_UP, DOWN, *biases]) or list(named).index(GATE_UP) > list(named).index(DOWN):
        return False
    (_, inner, hidden), down = weight_of(experts, GATE_UP).shape, weight_of(experts, DOWN).shape
    if (hidden, inner) != (down[1], 2 * down[2]):
        return False
    random = torch.Generator().manual_seed(0)
    twin: Any = copy.copy(experts)
    twin.num_experts = EXPERTS
    twin._parameters = {}
    for name, outs, width in ((GATE_UP, 2 * INNER, HIDDEN), (DOWN, HIDDEN, INNER)):
        shape = (EXPERTS, width, outs) if experts.is_transposed else (EXPERTS, outs, width)
        twin._parameters[name] = nn.Parameter(torch.randn(shape, generator=random), requires_grad=False)
        if biases:
            bias = torch.randn(EXPERTS, outs, generator=random)
            twin._parameters[name + BIAS] = nn.Parameter(bias, requires_grad=False)
    chosen = torch.rand(TOKENS, EXPERTS, generator=random).topk(TOP_K)
    try:
        ours = TreeExperts(twin, {}, TreeStep(), twin._apply_gate)
        for scale in SCALES:
            x = scale * torch.randn(TOKENS, HIDDEN, generator=random)
            y = type(experts).forward(twin, x, chosen.indices, chosen.values)
            found = ours.add_up(x, chosen.indices, chosen.values, None)
            if not torch.allclose(found, y, rtol=1e-4, atol=1e-5 * float(y.abs().max())):
                return False
    except BROKEN:
        return False
    return True


@torch.inference_mode()
def gates_with_silu(experts: Any, dtype: torch.dtype) -> bool:
    """Whether silu(gate) · up, gate first, is all that a mixture does in this dtype between its two products."""
    random = torch.Generator().manual_seed(0)
    for scale in SCALES:
        both = (scale * torch.randn(TOKENS, 2 * INNER, generator=random)).to(dtype)
        gate, up = both.chunk(2, dim=-1)
        try:
            if not torch.equal(experts._apply_gate(both), F.silu(gate) * up):
                return False
        except BROKEN:
            return False
    return True


def gate_of(experts: Any, *, silu: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """What lies between the products of a mixture. silu: it is what `gates_with_silu` says, for which there is a
    kernel."""
    own: Callable[[torch.Tensor], torch.Tensor] = SiluAndMul() if silu else experts._apply_gate
    return own
