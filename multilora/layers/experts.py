"""The experts of a mixture, stacked in one tensor, and the order in which they take the rows of a step.

Each token has a row for each expert that it takes. Rows are sorted by expert, so that every expert's lie together and
one grouped product serves all of them. Where there is such a product (bf16 on Hopper and Blackwell), nothing is asked
of the host and all shapes follow from the number of tokens; elsewhere one expert comes after the other.

Ranks of a group divide the experts: rows of those that others hold come last and are computed by nobody here, so that
what a rank combines is its share.
"""

from functools import partial

import torch
from torch import nn

from multilora.batch import ExpertRows
from multilora.distributed.group import SINGLE, Group
from multilora.layers.activation import SiluAndMul
from multilora.layers.context import ForwardContext
from multilora.layers.ops import fused_ops
from multilora.layers.weights.base import ExpertsFormat, ExpertsWeight, Share, Stored
from multilora.layers.weights.plain import EXPERT_MODULES, PLAIN
from multilora.lora.sharding import experts_of, local_site
from multilora.lora.sites import LoraSite

MOST_TAKEN, MOST_EXPERTS = 32, 1024  # which the routing kernel holds at a time


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
    """down(silu(gate(x)) · up(x)) of every expert, with the step's adapters.

    gate_up, down: the sites, whose outputs and inputs these are, with the experts that this rank holds; `held`: which
    of all `count` experts of the layer those are. gate_up_proj, down_proj: the weights, gate above up. places: by the
    modules that checkpoints have, in which weight they lie, and which rows of an expert's matrix they are.
    """

    def __init__(
        self,
        gate_up: LoraSite,
        down: LoraSite,
        *,
        device: torch.device,
        dtype: torch.dtype,
        group: Group = SINGLE,
        weight_format: ExpertsFormat = PLAIN,
    ):
        """gate_up, down: as declared. weight_format: of all matrices. Raises ModelUnsupported if it cannot be."""
        super().__init__()
        self.count, whole = down.experts, down
        self.gate_up, self.down = gate_up, down = local_site(gate_up, group.size), local_site(down, group.size)
        self.held = experts_of(whole, group.rank, group.size)
        count, inner, hidden = len(self.held), down.in_features, down.out_features
        make = partial(weight_format.make_experts, count, device=device, dtype=dtype)
        self.gate_up_proj: ExpertsWeight = make((inner, inner), hidden)
        self.down_proj: ExpertsWeight = make((hidden,), inner)
        gate, up, own = EXPERT_MODULES
        self.places: dict[str, tuple[ExpertsWeight, slice]] = {
            gate: (self.gate_up_proj, slice(0, inner)),
            up: (self.gate_up_proj, slice(inner, 2 * inner)),
            own: (self.down_proj, slice(0, hidden)),
        }
        self._silu_and_mul = SiluAndMul()

    def forward(self, x: torch.Tensor, rows: ExpertRows, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, hidden]. Returns [rows, hidden], in the order of `rows`."""
        gate_up = self._product(self.gate_up, self.gate_up_proj, x[rows.tokens], rows, ctx)
        return self._product(self.down, self.down_proj, self._silu_and_mul(gate_up), rows, ctx)

    def _product(
        self, site: LoraSite, weight: ExpertsWeight, x: torch.Tensor, rows: ExpertRows, ctx: ForwardContext
    ) -> torch.Tensor:
        y = weight.grouped_matmul(x, rows)
        if ctx.lora is not None and rows.segments is not None:
            ctx.lora.apply_experts(y, x, site.index, rows)
        return y

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can hold it: nothing waits for the device."""
        return self.gate_up_proj.capturable and self.down_proj.capturable

    def tensors(self, module: str) -> dict[str, Stored]:
        """Which tensors of a checkpoint fill one of an expert's modules, by their names there; a rank reads all or
        none of an expert."""
        weight, part = self.places[module]
        outs, width = part.stop - part.start, weight.width
        return weight.tensors(part, Share(outs, width, range(outs), range(width)))

    def load(self, expert: int, module: str, name: str, tensor: torch.Tensor) -> None:
        """Fill a module of an expert, which is held, from one of its `tensors`. expert: of all `count`."""
        weight, part = self.places[module]
        start = weight.rows_of(expert - self.held.start).start
        weight.load(slice(start + part.start, start + part.stop), name, tensor)
