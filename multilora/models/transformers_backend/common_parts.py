"""Parts of a tree that compute what ours do: found by running transformers' own code on stand-ins, never by names.

A norm and a gated MLP are recognised where their results on random numbers are ours to the last bit; a rotation where
the function that an attention layer calls gives ours, and what it returns goes into attention as it is.
"""

import copy
import inspect
from collections.abc import Callable
from itertools import permutations, product
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from multilora.attention.rotate import rotate
from multilora.layers.norm import NormForm, rms_norm

ROTATION = "apply_rotary_pos_emb"
"""What modelling files of transformers call their function that rotates queries and keys."""
BROKEN = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""How a module ends on stand-ins that it was not made for."""
SCALES = (1.0, 1e-3, 1e3)
"""Sizes of the numbers that a part is tried on: beside the squares of small ones counts what a norm adds to them, and
large ones show a limit."""


@torch.inference_mode()
def rms_norm_like(norm: nn.Module, dtype: torch.dtype) -> tuple[float, NormForm] | None:
    """The eps and the form with which our RMS norm computes what this module does in this dtype; None: it does
    something else.

    norm: a module whose one parameter is `weight` [size], which may be on the meta device.
    """
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(norm.get_parameter("weight").shape, generator=random).to(dtype)
    inputs = [(scale * torch.randn(1, 3, len(weight), generator=random)).to(dtype) for scale in SCALES]
    twin: Any = copy.copy(norm)
    twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        found = [type(norm).forward(twin, x) for x in inputs]
    except BROKEN:
        return None
    numbers = {value for value in vars(norm).values() if isinstance(value, float)}
    for eps, form in product(numbers, NormForm):
        if all(torch.equal(y, rms_norm(x, weight, eps, form)) for x, y in zip(inputs, found, strict=True)):
            return eps, form
    return None


class _StandIn(nn.Module):
    """Answers a call with a given tensor, and keeps what it was called with."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.answer


@torch.inference_mode()
def gated_mlp(module: nn.Module, dtype: torch.dtype) -> tuple[str, str, str] | None:
    """The names of gate, up and down if all that the module does in this dtype is down(silu(gate(x)) · up(x))."""
    linears = [name for name, child in module.named_children() if type(child) is nn.Linear]
    if len(linears) != 3 or len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    random = torch.Generator().manual_seed(0)
    children: dict[str, nn.Linear] = {name: module.get_submodule(name) for name in linears}  # type: ignore[misc]

    def rows(width: int) -> torch.Tensor:
        return (torch.randn(1, len(SCALES), width, generator=random) * torch.tensor(SCALES)[:, None]).to(dtype)

    stand_ins = {name: _StandIn(rows(child.out_features)) for name, child in children.items()}
    twin: Any = copy.copy(module)
    twin._modules = {**module._modules, **stand_ins}
    x = rows(next(iter(children.values())).in_features)
    try:
        found = type(module).forward(twin, x)
    except BROKEN:
        return None
    seen = {name: s.seen for name, s in stand_ins.items()}
    if any(len(inputs) != 1 for inputs in seen.values()):
        return None
    for gate, up, down in permutations(linears):
        if seen[gate][0] is not x or seen[up][0] is not x or found is not stand_ins[down].answer:
            continue
        g, u = stand_ins[gate].answer, stand_ins[up].answer
        if g.shape == u.shape and torch.equal(seen[down][0], F.silu(g) * u):
            return gate, up, down
    return None


Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def with_rotation(attention: nn.Module, replace: Callable[[Rotation], Rotation]) -> Callable[..., Any] | None:
    """The forward pass of an attention layer of transformers with another function in the place of the one that
    rotates; None: it calls none, or none that rotates as ours does.

    replace: makes that function from transformers'. The layer and its modelling file stay as they are.
    """
    own = inspect.unwrap(type(attention).forward)
    if not isinstance(own, FunctionType) or ROTATION not in own.__code__.co_names:
        return None
    rotation = own.__globals__.get(ROTATION)
    if rotation is None or not _rotates(rotation):
        return None
    names = {**own.__globals__, ROTATION: replace(rotation)}
    made = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    made.__kwdefaults__ = own.__kwdefaults__
    return MethodType(made, attention)


@torch.inference_mode()
def _rotates(function: Rotation) -> bool:
    """Whether a function turns queries and keys [1, heads, tokens, dim] as ours does, from cos and sin [1, tokens,
    dim] whose halves are the same."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 3, 8, generator=random), torch.randn(1, 2, 3, 8, generator=random)
    cos, sin = torch.randn(3, 1, 4, generator=random), torch.randn(3, 1, 4, generator=random)
    try:
        found = function(q, k, *(torch.cat((half, half), dim=-1).transpose(0, 1) for half in (cos, sin)))
        return all(
            torch.allclose(turned[0].transpose(0, 1), rotate(x[0].transpose(0, 1), cos, sin), rtol=1e-5, atol=1e-6)
            for x, turned in zip((q, k), found, strict=True)
        )
    except BROKEN:
        return False


def takes_whole_heads(args: tuple[Any, ...], kwargs: dict[str, Any], width: int) -> bool:
    """Whether a rotation is called as (q, k, cos, sin) with one angle for each pair of a head of `width`."""
    if kwargs or len(args) != 4:
        return False
    q, k, cos, sin = args
    heads = q.dim() == k.dim() == 4 and q.shape[-1] == k.shape[-1] == width
    return heads and all(x.dim() == 3 and x.shape[0] == 1 and x.shape[-1] == width for x in (cos, sin))
