"""The experts of a mixture, stacked in one tensor, and the order in which they take the rows of a step.

Each token has a row for each expert that it takes. Rows are sorted by expert, so that every expert's lie together and
one grouped product serves all of them. Where there is such a product (bf16 on Hopper and Blackwell), nothing is asked
of the host and all shapes follow from the number of tokens; elsewhere one expert comes after the other.

Ranks of a group divide the experts: rows of those that others hold come last and are computed by nobody here, so that
what a rank combines is its share.
"""

import torch
import torch.nn.functional as F
from torch import nn

from multilora.batch import ExpertRows
from multilora.distributed.group import SINGLE, Group
from multilora.layers.activation import SiluAndMul
from multilora.layers.context import ForwardContext
from multilora.layers.matmul import linear
from multilora.layers.ops import fused_ops
from multilora.lora.sharding import experts_of, local_site
from multilora.lora.sites import LoraSite

MOST_TAKEN, MOST_EXPERTS = 32, 1024  # which the routing kernel holds at a time

GROUPED_CAPABILITIES = ((9, 0), (10, 0))
"""Devices whose grouped product is one kernel; on others torch falls back to a loop that waits for the device."""


def route(
    logits: torch.Tensor, top_k: int, *, normalised: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each token takes, the most probable first, int64 [tokens, top_k], and their weights as `dtype`.

    logits: [tokens, experts]; normalised: the weights of a token add up to 1.
    """
    if logits.device.type == "cuda" and top_k <= MOST_TAKEN and logits.shape[1] <= MOST_EXPERTS:
        from multilora.layers import triton_routing

        return triton_routing.route(logits.contiguous(), top_k, normalised=normalised, dtype=dtype)
    weights, experts = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), top_k)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights.to(dtype)


def sort_by_expert(
    experts: torch.Tensor, num_experts: int, segments: torch.Tensor | None = None, held: range | None = None
) -> ExpertRows:
    """experts: int64 [tokens, top_k], which experts each token takes; segments: int64 [tokens], see `ExpertRows`.

    held: the experts that this rank holds, which count from 0 on in what is returned; None: all.
    """
    if experts.device.type == "cuda":
        from multilora.layers import triton_routing

        if experts.numel() <= triton_routing.MOST_ROWS:
            return triton_routing.sort_by_expert(experts, num_experts, segments, held)
    tokens, top_k = experts.shape
    if held is not None:
        num_experts, local = len(held), experts - held.start
        experts = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    keys = experts
    if segments is not None:
        keys = experts * (tokens + 1) + segments[:, None]
    taken, order = torch.sort(keys.flatten(), stable=True)
    row = torch.arange(len(order), device=order.device)
    places = torch.empty_like(order).scatter_(0, order, row).view(tokens, top_k)
    found = None
    if segments is not None:
        taken, found = taken // (tokens + 1), taken % (tokens + 1)
    ends = torch.searchsorted(taken, torch.arange(num_experts, device=order.device), right=True)
    if held is not None and found is not None:
        found, taken = torch.where(taken < num_experts, found, 0), taken.clamp(max=num_experts - 1)
    return ExpertRows(order // top_k, taken, ends.int(), places, found)


def has_grouped_product(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch multiplies groups of rows with weights of these widths in one kernel there, without the host."""
    if device.type != "cuda" or dtype != torch.bfloat16 or any(width % 8 for width in widths):
        return False
    return torch.cuda.get_device_capability(device) in GROUPED_CAPABILITIES


def grouped_product(x: torch.Tensor, weight: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
    """x: [rows, in], in the order of `rows`; weight: [experts, out, in]. Returns [rows, out], of which those that
    belong to no expert are of no use."""
    if _few_rows(x, weight):
        from multilora.layers import triton_grouped

        return triton_grouped.grouped_product(x, weight, rows.ends)
    if has_grouped_product(x.device, x.dtype, *weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=rows.ends)
    y = x.new_empty(len(x), weight.shape[1])
    start = 0
    for expert, end in enumerate(rows.ends.tolist()):
        if end > start:
            y[start:end] = linear(x[start:end], weight[expert])
        start = end
    return y


def _few_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether an expert has so few rows, on the average, that reading its weights is all that takes time."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    from multilora.layers import triton_grouped

    return len(x) <= triton_grouped.MOST_ROWS * len(weight)


def combine(y: torch.Tensor, rows: ExpertRows, weights: torch.Tensor) -> torch.Tensor:
    """Each token's sum of its rows of y, [rows, hidden], by `weights` [tokens, top_k]; a row whose weight is 0 is not
    looked at. Returns [tokens, hidden]."""
    ops = fused_ops(y.device)
    if ops is not None:
        total: torch.Tensor = ops.combine_experts(y, rows.places, weights)
        return total
    weight = weights[..., None].float()
    wide = torch.where(weight != 0, y[rows.places].float(), 0.0) * weight  # [tokens, top_k, hidden]
    return wide.sum(1).to(y.dtype)


class Experts(nn.Module):
    """down(silu(gate(x)) · up(x)) of every expert, as transformers stacks their weights, with the step's adapters.

    gate_up, down: the sites, whose outputs and inputs these are, with the experts that this rank holds; `held`: which
    of all `count` experts of the layer those are.
    """

    def __init__(
        self,
        gate_up: LoraSite,
        down: LoraSite,
        *,
        device: torch.device,
        dtype: torch.dtype,
        group: Group = SINGLE,
    ):
        """gate_up, down: as declared."""
        super().__init__()
        self.count, whole = down.experts, down
        self.gate_up, self.down = gate_up, down = local_site(gate_up, group.size), local_site(down, group.size)
        self.held = experts_of(whole, group.rank, group.size)
        self.gate_up_proj = _stacked(gate_up, device, dtype)
        self.down_proj = _stacked(down, device, dtype)
        self._silu_and_mul = SiluAndMul(device)

    def forward(self, x: torch.Tensor, rows: ExpertRows, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, hidden]. Returns [rows, hidden], in the order of `rows`."""
        gate_up = self._product(self.gate_up, self.gate_up_proj, x[rows.tokens], rows, ctx)
        return self._product(self.down, self.down_proj, self._silu_and_mul(gate_up), rows, ctx)

    def _product(
        self, site: LoraSite, weight: torch.Tensor, x: torch.Tensor, rows: ExpertRows, ctx: ForwardContext
    ) -> torch.Tensor:
        y = grouped_product(x, weight, rows)
        if ctx.lora is not None and rows.segments is not None:
            ctx.lora.apply_experts(y, x, site.index, rows)
        return y


def _stacked(site: LoraSite, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    data = torch.empty(site.experts, site.out_features, site.in_features, device=device, dtype=dtype)
    return nn.Parameter(data, requires_grad=False)
