"""`multilora adapters diff`: what changed between two versions of an adapter, module by module, and in the config.

Sizes are Frobenius norms of scaling · BA, computed from products of rank × rank, so that no full weight is ever made:
‖BA‖² = sum((BᵀB) ∘ (AAᵀ)). Called by `cli/adapter_work_commands.py`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from multilora.adapter_tools.pairs import LoraPair, PairedAdapter, read_pairs

IGNORED = ("peft_version", "inference_mode", "revision", "auto_mapping")
"""Fields that say nothing of what an adapter computes."""


@dataclass(frozen=True)
class ModuleDiff:
    """One module, or another tensor. change: the size of the difference over the old size, inf where there was
    nothing; None: only one version has it. cosine: of old and new; rank: of each."""

    name: str
    old_norm: float | None
    new_norm: float | None
    change: float | None
    cosine: float | None
    ranks: tuple[int | None, int | None] = (None, None)


@dataclass(frozen=True)
class AdapterDiff:
    """Two versions. config: field → (old, new). change: over all modules that both have."""

    old: str
    new: str
    config: dict[str, tuple[Any, Any]]
    modules: list[ModuleDiff]
    change: float

    @property
    def same(self) -> bool:
        return not self.config and all(m.change == 0 for m in self.modules)


def diff(old: str, new: str, *, progress: bool = False) -> AdapterDiff:
    """Compare two adapters, directories or hub ids. progress: draw a bar on stderr. Raises AdapterError."""
    before, after = read_pairs(old), read_pairs(new)
    names = sorted(before.pairs.keys() | after.pairs.keys())
    bar = tqdm(names, desc="diff", unit="module", disable=not progress)
    modules = [_module(name, before, after) for name in bar]
    both = [m for m in modules if m.change is not None]
    change = math.sqrt(sum((m.change or 0.0) ** 2 * (m.old_norm or 0.0) ** 2 for m in both if m.old_norm))
    size = math.sqrt(sum((m.old_norm or 0.0) ** 2 for m in both))
    modules += [_tensor(name, before, after) for name in sorted(before.others.keys() | after.others.keys())]
    fields = sorted((before.raw.keys() | after.raw.keys()) - set(IGNORED))
    config = {n: (before.raw.get(n), after.raw.get(n)) for n in fields}
    config = {n: pair for n, pair in config.items() if _plain(pair[0]) != _plain(pair[1])}
    return AdapterDiff(old, new, config, modules, change / size if size else 0.0)


def _plain(value: Any) -> Any:
    """The order of a list of modules means nothing, and neither does whether an empty field is there."""
    return sorted(map(str, value)) if isinstance(value, list) else value or None


def product(one: LoraPair, other: LoraPair) -> float:
    """The inner product of the two deltas, in fp64."""
    b = one.b.double().T @ other.b.double()
    a = one.a.double() @ other.a.double().T
    return one.scaling * other.scaling * float((b * a).sum())


def _module(name: str, before: PairedAdapter, after: PairedAdapter) -> ModuleDiff:
    old, new = before.pairs.get(name), after.pairs.get(name)
    norms = [None if pair is None else math.sqrt(max(0.0, product(pair, pair))) for pair in (old, new)]
    ranks = (old.rank if old else None, new.rank if new else None)
    if old is None or new is None or (old.a.shape[1], old.b.shape[0]) != (new.a.shape[1], new.b.shape[0]):
        return ModuleDiff(name, norms[0], norms[1], None, None, ranks)
    if torch.equal(old.a, new.a) and torch.equal(old.b, new.b) and old.scaling == new.scaling:
        return ModuleDiff(name, norms[0], norms[1], 0.0, 1.0 if norms[0] else None, ranks)
    joined = LoraPair(
        torch.cat([new.a.double() * new.scaling, old.a.double() * -old.scaling]),
        torch.cat([new.b.double(), old.b.double()], dim=1),
        1.0,
    )
    apart = math.sqrt(max(0.0, product(joined, joined)))
    return _diff(name, norms, apart, product(old, new), ranks)


def _tensor(name: str, before: PairedAdapter, after: PairedAdapter) -> ModuleDiff:
    old, new = before.others.get(name), after.others.get(name)
    norms = [None if tensor is None else float(tensor.double().norm()) for tensor in (old, new)]
    if old is None or new is None or old.shape != new.shape:
        return ModuleDiff(name, norms[0], norms[1], None, None)
    old, new = old.double(), new.double()
    return _diff(name, norms, float((new - old).norm()), float((new * old).sum()), (None, None))


def _diff(
    name: str, norms: list[float | None], apart: float, inner: float, ranks: tuple[int | None, int | None]
) -> ModuleDiff:
    old, new = norms[0] or 0.0, norms[1] or 0.0
    change = apart / old if old else (math.inf if apart else 0.0)
    return ModuleDiff(name, norms[0], norms[1], change, inner / (old * new) if old and new else None, ranks)
