"""Token embedding and language-model head; tied models give both the same matrix.

Ranks of a group divide the vocabulary. An embedding is the sum of the ranks' shares, of which one is not zero; logits
are gathered. What an adapter brings in place of a table, every rank holds: rank 0 adds it to its share of an
embedding, and all compute its logits.
"""

import torch
import torch.nn.functional as F
from torch import nn

from multilora.distributed.group import SINGLE, Group
from multilora.distributed.partition import padded_part, padded_size
from multilora.layers.context import ForwardContext
from multilora.layers.matmul import logits
from multilora.layers.ops import fused_ops
from multilora.lora.full_weights import FullWeightModules, product
from multilora.lora.sharding import local_site
from multilora.lora.sites import LoraSite, LoraSlice
from multilora.lora.table import FullWeight


class Embedding(nn.Module):
    """Token ids to rows of the table. The site's input is the vocabulary: ids count as one-hot rows.

    whole: the site as declared; site: what this rank holds of it.
    """

    def __init__(self, whole: LoraSite, *, device: torch.device, dtype: torch.dtype, group: Group = SINGLE):
        super().__init__()
        self.whole = whole
        self.site = site = local_site(whole, group.size)
        self.group = group
        weight = torch.empty(site.in_features, site.out_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)  # [vocab, hidden]

    @property
    def held(self) -> range:
        """The token ids whose rows this rank holds, from the first row on."""
        return padded_part(self.whole.in_features, self.group.rank, self.group.size)

    def forward(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """ids: int64 [tokens]. Returns [tokens, hidden]."""
        if self.group.size > 1:
            return self.group.all_reduce(self._share(ids, ctx))
        if ctx.full_weights is None:
            return F.embedding(ids, self.weight)
        y = F.embedding(ids.clamp(max=len(self.weight) - 1), self.weight)  # an adapter may have more tokens
        ctx.full_weights.embed(y, ids, self.site.layer, self.site.name)
        return y

    def _share(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """The rows of the tokens that this rank holds, zeros for the others."""
        ops = fused_ops(ids.device)
        if ops is not None:
            y: torch.Tensor = ops.embed_part(ids, self.weight, self.held)
        else:
            local = ids - self.held.start
            inside = (local >= 0) & (local < len(self.held))
            y = F.embedding(torch.where(inside, local, 0), self.weight).masked_fill_(~inside[:, None], 0)
        if ctx.full_weights is not None:
            ctx.full_weights.embed(
                y, ids, self.site.layer, self.site.name, first=self.held.start, replaces=self.group.rank == 0
            )
        return y


class LMHead(nn.Module):
    """Hidden rows to logits, in fp32. `tied_to`: share this embedding's matrix instead of owning one.

    whole: the site as declared; site: what this rank holds of it.
    """

    def __init__(
        self,
        whole: LoraSite,
        *,
        tied_to: Embedding | None,
        device: torch.device,
        dtype: torch.dtype,
        group: Group = SINGLE,
    ):
        super().__init__()
        self.whole = whole
        self.site = site = local_site(whole, group.size)
        self.group = group
        if tied_to is not None:
            self.weight = tied_to.weight
        else:
            weight = torch.empty(site.out_features, site.in_features, device=device, dtype=dtype)
            self.weight = nn.Parameter(weight, requires_grad=False)  # [vocab, hidden]
        self.bias: nn.Parameter | None = None
        if site.bias:
            assert group.size == 1, "no model that ranks share has a bias here"
            self.bias = nn.Parameter(torch.empty(site.out_features, device=device, dtype=dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """hidden: [rows, hidden]; the context's segments count these rows. Returns fp32 [rows, vocab].

        An adapter with its own head may have more or fewer tokens than the base model: then there are more columns,
        and -inf where a row's vocabulary ends.
        """
        y = logits(hidden, self.weight)
        if self.bias is not None:
            y += self.bias
        if self.group.size > 1:
            return self._gathered(y, hidden, ctx)
        if ctx.full_weights is not None:
            y = self._replace(y, hidden, ctx.full_weights)
        if ctx.lora is not None:
            ctx.lora.apply(y, hidden, self.site.index)
        return y

    def base_weight(self, part: LoraSlice) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ARG002 - the contract's
        """Weight [vocab, hidden] and bias [vocab] of the site's one slice; read-only."""
        return self.weight, self.bias

    def _replace(self, y: torch.Tensor, hidden: torch.Tensor, full_weights: FullWeightModules) -> torch.Tensor:
        """y with the logits of adapters that bring their own head, or rows of it, in place of the base model's."""
        found = list(full_weights.find(self.site.layer, self.site.name))
        y = _widened(y, found)
        for rows, weights in found:
            if weights.token_ids is None:
                y[rows, weights.rows :] = -torch.inf
            columns = slice(weights.rows) if weights.token_ids is None else weights.token_ids
            y[rows, columns] = product(hidden[rows], weights).to(y.dtype)
            if self.bias is not None and weights.token_ids is None:
                count = min(weights.rows, len(self.bias))
                y[rows, :count] += self.bias[:count]
            elif self.bias is not None:
                y[rows, columns] += self.bias[columns]
        return y

    def _gathered(self, y: torch.Tensor, hidden: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """The logits of all ranks, from y, the base model's of this rank's tokens, [rows, part of vocab].

        LoRA comes before the gathering, and what replaces logits after it, since every rank holds all of that: the
        base model's own are zero there.
        """
        vocab, found = self.whole.out_features, []
        if ctx.full_weights is not None:
            found = list(ctx.full_weights.find(self.site.layer, self.site.name))
            first = self.group.rank * padded_size(vocab, self.group.size)
            for rows, weights in found:
                _clear(y[rows], weights, first)
        if ctx.lora is not None:
            ctx.lora.apply(y, hidden, self.site.index)
        y = _widened(self.group.gather_columns(y, vocab), found)
        for rows, weights in found:
            own = product(hidden[rows], weights).to(y.dtype)
            if weights.token_ids is None:
                y[rows, vocab : weights.rows] = 0.0
                y[rows, : weights.rows] += own
                y[rows, weights.rows :] = -torch.inf
            else:
                y[rows, weights.token_ids] += own
        return y


def _widened(y: torch.Tensor, found: list[tuple[slice, FullWeight]]) -> torch.Tensor:
    """y with as many columns as the largest of these vocabularies has, new ones −inf; y itself if it has them."""
    more = max((w.rows for _, w in found if w.token_ids is None), default=0) - y.shape[1]
    return F.pad(y, (0, more), value=-torch.inf) if more > 0 else y


def _clear(y: torch.Tensor, weights: FullWeight, first: int) -> None:
    """Zero the logits that `weights` replace, in place. y: [rows, part of vocab], of the tokens from `first` on."""
    if weights.token_ids is None:
        y.zero_()
    else:
        local = weights.token_ids - first
        y[:, local[(local >= 0) & (local < y.shape[1])]] = 0.0
