"""Our modules in a tree of transformers: they are called as transformers calls its own, with rows alone.

What a layer of ours needs besides (the step's backends, the rotation) stands in a `TreeStep`, which the model fills
before it calls the tree and which its modules share. Rows come in any shape whose last dimension is the width; they
are the step's rows in order.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from multilora.attention.rotate import CosSin
from multilora.distributed.group import SINGLE, Group
from multilora.layers.context import ForwardContext
from multilora.layers.embedding import Embedding, LMHead
from multilora.layers.linear import Linear
from multilora.layers.weights.base import WeightFormat
from multilora.lora.sites import LoraSite, NormModule

ATTENTION = "multilora"
"""What our attention is called in transformers' attention interface."""


@dataclass(slots=True)
class TreeStep:
    """What the modules of one model share during a step. attended: how many attention layers have computed."""

    context: ForwardContext | None = None
    rope: CosSin | None = None
    attended: int = 0
    logits: torch.Tensor | None = None  # as the head gave them, before what transformers does to them

    @property
    def ctx(self) -> ForwardContext:
        assert self.context is not None, "the model sets it before it calls the tree"
        return self.context


class TreeLinear(Linear):
    """Stands for an `nn.Linear` or a `Conv1D`. Shares of its outputs are summed here: no norm behind it would."""

    def __init__(
        self,
        whole: LoraSite,
        step: TreeStep,
        *,
        device: torch.device,
        dtype: torch.dtype,
        formats: Sequence[WeightFormat],
        group: Group = SINGLE,
    ):
        super().__init__(whole, device=device, dtype=dtype, formats=formats, group=group)
        self._step = step

    def forward(self, x: torch.Tensor, ctx: ForwardContext | None = None) -> torch.Tensor:
        """x: [..., in_features]. Returns [..., out_features]."""
        y = super().forward(x.reshape(-1, x.shape[-1]).contiguous(), ctx or self._step.ctx)
        if self.is_share:
            y = self.group.all_reduce(y)
        return y.view(*x.shape[:-1], -1)


class TreeEmbedding(Embedding):
    """Stands for an `nn.Embedding`. scale: what the model multiplies embedded rows with, adapters' included."""

    def __init__(
        self,
        whole: LoraSite,
        step: TreeStep,
        *,
        scale: float | None,
        device: torch.device,
        dtype: torch.dtype,
        group: Group = SINGLE,
    ):
        super().__init__(whole, device=device, dtype=dtype, group=group)
        self._step = step
        self.scale = scale

    def forward(self, ids: torch.Tensor, ctx: ForwardContext | None = None) -> torch.Tensor:
        """ids: int64 [...]. Returns [..., hidden]."""
        y = super().forward(ids.reshape(-1), ctx or self._step.ctx)
        if self.scale is not None:
            y = y * self.scale
        return y.view(*ids.shape, -1)


class TreeHead(LMHead):
    """Stands for the `nn.Linear` that gives logits."""

    def __init__(
        self,
        whole: LoraSite,
        step: TreeStep,
        *,
        tied_to: Embedding | None,
        device: torch.device,
        dtype: torch.dtype,
        group: Group = SINGLE,
    ):
        super().__init__(whole, tied_to=tied_to, device=device, dtype=dtype, group=group)
        self._step = step

    def forward(self, hidden: torch.Tensor, ctx: ForwardContext | None = None) -> torch.Tensor:
        """hidden: [..., hidden]. Returns fp32 [..., vocab], which `TreeStep.logits` has too."""
        y = super().forward(hidden.reshape(-1, hidden.shape[-1]).contiguous(), ctx or self._step.ctx)
        self._step.logits = y
        return y.view(*hidden.shape[:-1], -1)


class ReplacedNorm:
    """A forward hook of a norm of transformers: rows of adapters that bring a weight of their own are computed by it.

    token_dim: which dimension of the norm's input counts the tokens.
    """

    def __init__(self, norm: NormModule, token_dim: int, step: TreeStep):
        self._norm = norm
        self._token_dim = token_dim
        self._step = step

    def __call__(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        full_weights = self._step.ctx.full_weights
        if full_weights is None:
            return output
        for rows, weights in full_weights.find(self._norm.layer, self._norm.module):
            twin = copy.copy(module)
            weight = weights.pieces[0].weight[0].to(module.weight.dtype)
            twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
            count = rows.stop - rows.start
            x = args[0].narrow(self._token_dim, rows.start, count)
            output.narrow(self._token_dim, rows.start, count).copy_(type(module).forward(twin, x))
        return output


class PagedAttention:
    """What an attention layer of transformers calls, by our name in the attention interface, over the step's pages.

    width: the head_dim of the pages; keys or values that are narrower are padded with zeros, which change no score
    and no sum. scale: the model's; a layer with another one has its queries multiplied.
    """

    def __init__(self, step: TreeStep, width: int, scale: float):
        self._step = step
        self._width = width
        self._scale = scale

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """query: [1, heads, tokens, key_dim]; key, value: [1, kv_heads, tokens, …]. Returns [1, tokens, heads, …]."""
        step = self._step
        assert step.rope is not None
        own = scale if scale is not None else query.shape[-1] ** -0.5
        if own != self._scale:
            query = query * (own / self._scale)
        q, k, v = (self._rows(t) for t in (query, key, value))
        out = step.ctx.attention.forward(step.attended, q, k, v, step.rope, sinks)
        step.attended += 1
        return out[None, ..., : value.shape[-1]]

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = x[0].transpose(0, 1)  # [tokens, heads, dim]
        short = self._width - rows.shape[-1]
        if short:
            rows = F.pad(rows, (0, short))
        return rows if rows.stride(-1) == 1 else rows.contiguous()


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,  # noqa: ARG001 - there is none: what layers see, the backend knows
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Our function in transformers' attention interface."""
    paged: PagedAttention = module.paged_attention
    return paged(query, key, value, kwargs.get("scaling"), kwargs.get("s_aux")), None
