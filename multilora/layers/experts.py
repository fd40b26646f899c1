"""The experts of a mixture, stacked in one tensor, and the order in which they take the rows of a step.

Each token has a row for each expert that it takes. Rows are sorted by expert, so that every expert's lie together and
one grouped product serves all of them. Where there is such a product (bf16 on Hopper and Blackwell), nothing is asked
of the host and all shapes follow from the number of tokens; elsewhere one expert comes after the other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from multilora.layers.activation import SiluAndMul
from multilora.layers.matmul import linear
from multilora.layers.ops import fused_ops

GROUPED_CAPABILITIES = ((9, 0), (10, 0))
"""Devices whose grouped product is one kernel; on others torch falls back to a loop that waits for the device."""


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The rows of a step in the order of their experts.

    tokens: int64 [rows], the token that a row belongs to; ends: int32 [experts], the row after each expert's last;
    places: int64 [tokens, top_k], the row of a token's k-th expert.
    """

    tokens: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> ExpertRows:
    """experts: int64 [tokens, top_k], which experts each token takes."""
    taken, order = torch.sort(experts.flatten(), stable=True)
    number = torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(taken, torch.arange(num_experts, device=order.device), right=True)
    places = torch.empty_like(order).scatter_(0, order, number)
    return ExpertRows(order // experts.shape[1], ends.int(), places.view(experts.shape))


def has_grouped_product(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch multiplies groups of rows with weights of these widths in one kernel there, without the host."""
    if device.type != "cuda" or dtype != torch.bfloat16 or any(width % 8 for width in widths):
        return False
    return torch.cuda.get_device_capability(device) in GROUPED_CAPABILITIES


def grouped_product(x: torch.Tensor, weight: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
    """x: [rows, in], in the order of `rows`; weight: [experts, out, in]. Returns [rows, out]."""
    if has_grouped_product(x.device, x.dtype, *weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=rows.ends)
    y = x.new_empty(len(x), weight.shape[1])
    start = 0
    for expert, end in enumerate(rows.ends.tolist()):
        if end > start:
            y[start:end] = linear(x[start:end], weight[expert])
        start = end
    return y


def combine(y: torch.Tensor, rows: ExpertRows, weights: torch.Tensor) -> torch.Tensor:
    """Each token's sum of its rows of y, [rows, hidden], by `weights` [tokens, top_k]. Returns [tokens, hidden]."""
    ops = fused_ops(y.device)
    if ops is not None:
        total: torch.Tensor = ops.combine_experts(y, rows.places, weights)
        return total
    wide = y[rows.places].float() * weights[..., None].float()  # [tokens, top_k, hidden]
    return wide.sum(1).to(y.dtype)


class Experts(nn.Module):
    """down(silu(gate(x)) · up(x)) of every expert, as transformers stacks their weights."""

    def __init__(self, count: int, hidden: int, inner: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.count, self.hidden, self.inner = count, hidden, inner
        gate_up = torch.empty(count, 2 * inner, hidden, device=device, dtype=dtype)
        down = torch.empty(count, hidden, inner, device=device, dtype=dtype)
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)
        self._silu_and_mul = SiluAndMul(device)

    def forward(self, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """x: [tokens, hidden]. Returns [rows, hidden], in the order of `rows`."""
        gate_up = grouped_product(x[rows.tokens], self.gate_up_proj, rows)
        return grouped_product(self._silu_and_mul(gate_up), self.down_proj, rows)
