"""Token embedding and language-model head; tied models give both the same matrix."""

import torch
import torch.nn.functional as F
from torch import nn

from multilora.layers.context import ForwardContext
from multilora.layers.matmul import logits
from multilora.lora.full_weights import FullWeightModules, product
from multilora.lora.sites import LoraSite, LoraSlice


class Embedding(nn.Module):
    """Token ids to rows of the table. The site's input is the vocabulary: ids count as one-hot rows."""

    def __init__(self, site: LoraSite, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.site = site
        weight = torch.empty(site.in_features, site.out_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)  # [vocab, hidden]

    def forward(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """ids: int64 [tokens]. Returns [tokens, hidden]."""
        if ctx.full_weights is None:
            return F.embedding(ids, self.weight)
        y = F.embedding(ids.clamp(max=len(self.weight) - 1), self.weight)  # an adapter may have more tokens
        ctx.full_weights.embed(y, ids, self.site.layer, self.site.name)
        return y


class LMHead(nn.Module):
    """Hidden rows to logits, in fp32. `tied_to`: share this embedding's matrix instead of owning one."""

    def __init__(
        self,
        site: LoraSite,
        *,
        tied_to: Embedding | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.site = site
        if tied_to is not None:
            self.weight = tied_to.weight
        else:
            weight = torch.empty(site.out_features, site.in_features, device=device, dtype=dtype)
            self.weight = nn.Parameter(weight, requires_grad=False)  # [vocab, hidden]

    def forward(self, hidden: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """hidden: [rows, hidden]; the context's segments count these rows. Returns fp32 [rows, vocab].

        An adapter with its own head may have more or fewer tokens than the base model: then there are more columns,
        and -inf where a row's vocabulary ends.
        """
        y = logits(hidden, self.weight)
        if ctx.full_weights is not None:
            y = self._replace(y, hidden, ctx.full_weights)
        if ctx.lora is not None:
            ctx.lora.apply(y, hidden, self.site.index)
        return y

    def base_weight(self, part: LoraSlice) -> tuple[torch.Tensor, None]:  # noqa: ARG002 - part of the contract
        """Weight [vocab, hidden] of the site's one slice, and that there is no bias; read-only."""
        return self.weight, None

    def _replace(self, y: torch.Tensor, hidden: torch.Tensor, full_weights: FullWeightModules) -> torch.Tensor:
        """y with the logits of adapters that bring their own head, or rows of it, in place of the base model's."""
        found = list(full_weights.find(self.site.layer, self.site.name))
        width = max([y.shape[1], *(w.rows for _, w in found if w.token_ids is None)])
        y = F.pad(y, (0, width - y.shape[1]), value=-torch.inf)
        for rows, weights in found:
            if weights.token_ids is None:
                y[rows, weights.rows :] = -torch.inf
            columns = slice(weights.rows) if weights.token_ids is None else weights.token_ids
            y[rows, columns] = product(hidden[rows], weights).to(y.dtype)
        return y
