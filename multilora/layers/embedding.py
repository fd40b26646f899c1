"""Token embedding and language-model head; tied models give both the same matrix."""

import torch
import torch.nn.functional as F
from torch import nn

from multilora.layers.context import ForwardContext
from multilora.layers.matmul import logits
from multilora.lora.sites import MODEL_LEVEL, LoraSite
from multilora.lora.whole import product


class Embedding(nn.Module):
    """Token ids to rows of the table."""

    name = "embed_tokens"

    def __init__(self, vocab_size: int, hidden_size: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)  # [vocab, hidden]

    def forward(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """ids: int64 [tokens]. Returns [tokens, hidden]."""
        y = F.embedding(ids, self.weight)
        if ctx.whole is not None:
            ctx.whole.embed(y, ids, MODEL_LEVEL, self.name)
        return y


class LMHead(nn.Module):
    """Hidden rows to logits, in fp32. `tied_to`: share this embedding's matrix instead of owning one."""

    def __init__(
        self,
        site: LoraSite,
        vocab_size: int,
        hidden_size: int,
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
            weight = torch.empty(vocab_size, hidden_size, device=device, dtype=dtype)
            self.weight = nn.Parameter(weight, requires_grad=False)  # [vocab, hidden]

    def forward(self, hidden: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """hidden: [rows, hidden]; the context's segments count these rows. Returns fp32 [rows, vocab]."""
        y = logits(hidden, self.weight)
        if ctx.whole is not None:
            for rows, weights in ctx.whole.find(MODEL_LEVEL, self.site.name):
                columns = slice(None) if weights.token_ids is None else weights.token_ids
                y[rows, columns] = product(hidden[rows], weights).to(y.dtype)
        if ctx.lora is not None:
            ctx.lora.apply(y, hidden, self.site.index)
        return y
