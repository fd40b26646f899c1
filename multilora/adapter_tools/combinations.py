"""The ways in which PEFT combines adapters, as arithmetic on one module's matrices; `tests` hold each against PEFT.

    linear, ties, dare_linear, dare_ties, magnitude_prune   on A and on B, each times √(weight · scaling)
    cat                                                     side by side: exact, of the sum of the ranks
    svd, ties_svd, …                                        on the products, then the best of a lower rank

TIES (Yadav et al. 2023, arXiv:2306.01708) keeps the largest numbers, elects a sign, and averages those that have it;
DARE (Yu et al. 2023, arXiv:2311.03099) drops numbers at random and scales up the others. Called by `compose.py`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from multilora.adapter_tools.methods import ON_PRODUCTS
from multilora.adapter_tools.pairs import LoraPair

Combine = Callable[[list[Tensor], Tensor], Tensor]


def combine(
    method: str,
    pairs: Sequence[LoraPair],
    weights: Sequence[float],
    rank: int,
    *,
    density: float = 1.0,
    sign: str = "total",
    random: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of one module, of scaling 1. rank: of the result; where a module needs less,
    rows of zeros follow. density: part of the numbers that is kept; sign: how TIES elects, "total" or "frequency"."""
    if method == "cat":
        a = torch.cat([p.a * (w * p.scaling) for p, w in zip(pairs, weights, strict=True)])
        return padded(a, torch.cat([p.b for p in pairs], dim=1), rank)
    base = method.removesuffix("_svd")
    mix = _mixing("linear" if base == "svd" else base, density, sign, random)
    if method in ON_PRODUCTS:
        return padded(*_best(mix([p.delta() for p in pairs], torch.tensor(list(weights))), rank), rank)
    scaled = [w * p.scaling for p, w in zip(pairs, weights, strict=True)]
    of_b = torch.tensor([math.sqrt(abs(s)) for s in scaled])
    of_a = torch.tensor([math.copysign(math.sqrt(abs(s)), s) for s in scaled])
    dtype = pairs[0].a.dtype
    return padded(mix([p.a for p in pairs], of_a).to(dtype), mix([p.b for p in pairs], of_b).to(dtype), rank)


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product, of a larger rank."""
    more = rank - a.shape[0]
    return torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))


def _best(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B whose product is nearest to delta."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]


def _mixing(method: str, density: float, sign: str, random: torch.Generator | None) -> Combine:
    def thinned(tensor: Tensor) -> Tensor:
        if density >= 1:
            return tensor
        return _kept_at_random(tensor, density, random) if method.startswith("dare") else _largest(tensor, density)

    def mix(tensors: list[Tensor], weights: Tensor) -> Tensor:
        stacked = torch.stack(tensors if method == "linear" else [thinned(t) for t in tensors])
        weighted = stacked * weights.view(-1, *[1] * (stacked.dim() - 1))
        if not method.endswith("ties"):
            return weighted.sum(dim=0)
        agree = _elected(stacked, sign)
        return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)

    return mix


def _largest(tensor: Tensor, density: float) -> Tensor:
    """All but this part of the numbers, those of the largest size, are 0."""
    flat = tensor.reshape(-1)
    kept = torch.zeros_like(flat)
    at = flat.abs().topk(int(density * flat.numel())).indices
    kept[at] = flat[at]
    return kept.view_as(tensor)


def _kept_at_random(tensor: Tensor, density: float, random: torch.Generator | None) -> Tensor:
    """Each number is 0, or with probability `density` 1 / density times itself."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=random) / density


def _elected(stacked: Tensor, sign: str) -> Tensor:
    """Where a tensor has the sign that the numbers' sum has (total), or most of them (frequency); ties are plus."""
    votes = (stacked if sign == "total" else stacked.sign()).sum(dim=0)
    return stacked.sign() == torch.where(votes >= 0, 1, -1)
