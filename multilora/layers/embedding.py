"""Token embedding and language-model head; tied models give both the same matrix."""

import torch
import torch.nn.functional as F
from torch import nn

from multilora.layers.matmul import logits


class Embedding(nn.Module):
    """Token ids to rows of the table."""

    def __init__(self, vocab_size: int, hidden_size: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)  # [vocab, hidden]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [tokens]. Returns [tokens, hidden]."""
        return F.embedding(ids, self.weight)


class LMHead(nn.Module):
    """Hidden rows to logits, in fp32. `tied_to`: share this embedding's matrix instead of owning one."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tied_to: Embedding | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        super().__init__()
        if tied_to is not None:
            self.weight = tied_to.weight
        else:
            weight = torch.empty(vocab_size, hidden_size, device=device, dtype=dtype)
            self.weight = nn.Parameter(weight, requires_grad=False)  # [vocab, hidden]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden]. Returns fp32 [rows, vocab]."""
        return logits(hidden, self.weight)
