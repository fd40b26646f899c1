"""The classification head: one matrix over the hidden row of a text's last token, the base model's or an adapter's.

Every model has this layer, most of them without a weight: PEFT's SEQ_CLS adapters bring a `score` of their own
(modules_to_save), with as many labels as they were trained for. Every rank of a group holds all of it.
"""

import torch
from torch import nn

from multilora.layers.context import ForwardContext
from multilora.layers.matmul import logits
from multilora.lora.full_weights import product
from multilora.lora.sites import MODEL_LEVEL, SCORE


class ScoreHead(nn.Module):
    """labels: of the base model's own head; 0: it has none."""

    def __init__(self, labels: int, hidden: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.labels = labels
        self.dtype = dtype
        self.weight: nn.Parameter | None = None
        if labels:
            weight = torch.empty(labels, hidden, device=device, dtype=dtype)
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """hidden: [rows, hidden]; the context's segments count these rows. Returns fp32 [rows, most labels], -inf
        behind the labels of a row that has fewer."""
        hidden = hidden.to(self.dtype)
        found = [] if ctx.full_weights is None else list(ctx.full_weights.find(MODEL_LEVEL, SCORE))
        width = max([self.labels, *(weights.rows for _, weights in found)])
        y = torch.full((len(hidden), width), -torch.inf, device=hidden.device)
        if self.weight is not None:
            y[:, : self.labels] = logits(hidden, self.weight)
        for rows, weights in found:
            y[rows, : weights.rows] = product(hidden[rows], weights).float()
            y[rows, weights.rows :] = -torch.inf
        return y
