"""Our modules in a tree of transformers: they are called as transformers calls its own, with rows alone.

What a layer of ours needs besides (the step's backends, the rotation) stands in a `TreeStep`, which the model fills
before it calls the tree and which its modules share. Rows come in any shape whose last dimension is the width; they
are the step's rows in order.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from multilora.attention.rotate import CosSin
from multilora.distributed.group import SINGLE, Group
from multilora.layers.context import ForwardContext
from multilora.layers.embedding import Embedding, LMHead
from multilora.layers.linear import GateUp, Linear
from multilora.layers.norm import RMSNorm
from multilora.layers.weights.base import Weight, WeightFormat
from multilora.lora.sites import LoraSite, LoraSlice, NormModule
from multilora.models.transformers_backend.common_parts import Rotation, takes_whole_heads

ATTENTION = "multilora"
"""What our attention is called in transformers' attention interface."""


@dataclass(slots=True)
class TreeStep:
    """What the modules of one model share during a step. attended: how many attention layers have computed."""

    context: ForwardContext | None = None
    unturned: CosSin | None = None  # a rotation that changes nothing
    attended: int = 0
    logits: torch.Tensor | None = None  # as the head gave them, before what transformers does to them
    _turned: tuple[torch.Tensor, torch.Tensor, CosSin] | None = None
    _angles: dict[int, tuple[torch.Tensor, torch.Tensor, CosSin]] = field(default_factory=dict)

    @property
    def ctx(self) -> ForwardContext:
        assert self.context is not None, "the model sets it before it calls the tree"
        return self.context

    def begin(self, context: ForwardContext, unturned: CosSin) -> None:
        """A forward pass starts."""
        self.context, self.unturned, self.attended = context, unturned, 0
        self._angles.clear()
        self._turned = None

    def leave(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Leave the rotation of the next layer's q and k to attention. cos, sin: [1, tokens, head_dim], whose halves
        are the same; a step has one pair of them for all its layers, or a few."""
        if id(cos) not in self._angles or self._angles[id(cos)][1] is not sin:
            half = cos.shape[-1] // 2
            rope = cos[0, :, None, :half].float().contiguous(), sin[0, :, None, :half].float().contiguous()
            self._angles[id(cos)] = cos, sin, rope
        self._turned = q, k, self._angles[id(cos)][2]

    def take_rotation(self, q: torch.Tensor, k: torch.Tensor) -> CosSin:
        """What attention has to rotate q and k by."""
        turned, self._turned = self._turned, None
        if turned is not None:
            assert turned[0] is q and turned[1] is k, "what was rotated goes into attention as it is"
            return turned[2]
        assert self.unturned is not None, "the model sets it before it calls the tree"
        return self.unturned


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


class TreeSiblings(TreeLinear):
    """Linear layers that read the same tensor, as one product; a `TreeSlice` stands where each of them stood.

    What the first of them is called with is multiplied for all; the others, called with the very same tensor, find
    their columns ready. (Between two of them nobody may write to it: the examination of a model cannot see that, its
    comparison with transformers does.)
    """

    _x: torch.Tensor | None = None
    _y: torch.Tensor | None = None

    def columns(self, x: torch.Tensor, part: LoraSlice) -> torch.Tensor:
        """One slice's outputs of x [..., in_features]: [..., its columns]."""
        if self._y is None or self._x is not x:
            self._x, self._y = x, self(x)
        y = self._y[..., part.columns]
        if part is self.site.slices[-1]:
            self._x = self._y = None
        return y


class TreeSlice(nn.Module):
    """Stands for one of several `nn.Linear`s that are multiplied together."""

    def __init__(self, siblings: TreeSiblings, number: int):
        super().__init__()
        self._siblings = (siblings,)  # no child: the tree has it elsewhere
        self._part = siblings.site.slices[number]

    @property
    def weight(self) -> Weight:
        """That of all of them, of which some of transformers' modules ask the dtype."""
        return self._siblings[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features]. Returns [..., its out_features], a view."""
        return self._siblings[0].columns(x, self._part)


class TreeGateUp(GateUp):
    """Gate and up of an MLP of transformers that has `mlp_forward` as its forward pass."""

    def __init__(self, whole: LoraSite, step: TreeStep, **kind: Any):
        super().__init__(whole, **kind)
        self._step = step

    def forward(self, x: torch.Tensor, ctx: ForwardContext | None = None) -> torch.Tensor:
        """x: [..., in_features]. Returns silu(gate) · up, [..., out_features / 2]."""
        y = super().forward(x.reshape(-1, x.shape[-1]).contiguous(), ctx or self._step.ctx)
        return y.view(*x.shape[:-1], -1)

    def mlp_forward(self, mlp: nn.Module, down: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward pass of the MLP that these are gate and up of. down: the name of the third linear layer."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = mlp.get_submodule(down)(self(x))
            return y

        return forward


class TreeNorm(RMSNorm):
    """Stands for an RMS norm of transformers that computes what ours does.

    token_dim: which dimension of its input counts the tokens; those before it have one element, but for heads.
    """

    def __init__(self, norm: NormModule, token_dim: int, step: TreeStep, eps: float, **kind: Any):
        super().__init__(norm, eps, **kind)
        self._token_dim = token_dim
        self._step = step

    def forward(self, x: torch.Tensor, ctx: ForwardContext | None = None) -> torch.Tensor:
        """x: [tokens, size], [1, tokens, size], [1, tokens, heads, size] or [1, heads, tokens, size]."""
        rows = x if self._token_dim == 0 else x[0]
        rows = rows.transpose(0, 1) if self._token_dim == 2 else rows
        y = super().forward(rows if rows.stride(-1) == 1 else rows.contiguous(), ctx or self._step.ctx)
        y = y.transpose(0, 1) if self._token_dim == 2 else y
        return y.view(x.shape) if self._token_dim < 2 else y[None]


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
        rope = step.take_rotation(query, key)
        own = scale if scale is not None else query.shape[-1] ** -0.5
        if own != self._scale:
            query = query * (own / self._scale)
        q, k, v = (self._rows(t) for t in (query, key, value))
        out = step.ctx.attention.forward(step.attended, q, k, v, rope, sinks)
        step.attended += 1
        return out[None, ..., : value.shape[-1]]

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = x[0].transpose(0, 1)  # [tokens, heads, dim]
        short = self._width - rows.shape[-1]
        if short:
            rows = F.pad(rows, (0, short))
        return rows if rows.stride(-1) == 1 else rows.contiguous()


def rotation_left_to(step: TreeStep, width: int) -> Callable[[Rotation], Rotation]:
    """For `with_rotation`: leaves heads of `width` to attention."""

    def replace(rotation: Rotation) -> Rotation:
        def leave(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if not takes_whole_heads(args, kwargs, width):
                return rotation(*args, **kwargs)
            step.leave(*args)
            return args[0], args[1]

        return leave

    return replace


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
