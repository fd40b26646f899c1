"""Where adapters can act in a tree of transformers: what an examination found, as declarations of sites and norms.

Owns the names. A module is named after the last component of its path, as PEFT's users know it, where all modules of
that name have one place in their layers and one shape ("q_proj"); else by its path inside the layer ("mlp.c_proj").
"""

import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from multilora.lora.sites import (
    EMBED,
    HEAD,
    MODEL_LEVEL,
    DeclaredModules,
    LoraSite,
    LoraSlice,
    NormModule,
    Shard,
    target,
)
from multilora.models.transformers_backend.division import Cut, Division
from multilora.models.transformers_backend.probe import Examination, ExpertsFact, LinearFact, NormFact
from multilora.models.transformers_backend.tree_experts import DOWN, GATE_UP

JOINT = "+"
"""Between the names of linear layers that are one: "q_proj+k_proj+v_proj"."""


@dataclass(frozen=True)
class Sites:
    """Declarations by the path of the module in the tree; linear layers that are one site by the paths of all of
    them, in the order of its slices; those of experts by the names of their weights. layers: the path of the list of
    decoder layers."""

    layers: str
    embedding: LoraSite
    head: LoraSite | None
    linears: dict[tuple[str, ...], LoraSite]
    norms: dict[str, NormModule]
    experts: dict[str, dict[str, LoraSite]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Named:
    """A module and what its name must tell apart. inner: its path inside its layer, or in the model."""

    path: str
    layer: int
    inner: str
    shape: tuple[object, ...]

    @property
    def leaf(self) -> str:
        return self.inner.rpartition(".")[2]


def layers_path(examination: Examination) -> str:
    """The path of the list whose entries attend first: "model.layers", "transformer.h"; "": they are in no list."""
    found = re.match(r"(.+?)\.\d+(?:\.|$)", examination.attentions[0].path)
    return found[1] if found else ""


def declare(
    examination: Examination,
    declared: DeclaredModules,
    division: Division,
    *,
    embedding: tuple[str, int, int],
    head: tuple[str, int, int, bool],
    has_head: bool = True,
) -> Sites:
    """embedding: path, rows, columns. head: path, inputs, outputs, whether it has a bias; has_head False: the tree
    has one that the model does without."""
    layers, last = layers_path(examination), len(examination.attentions)
    facts = [f for f in examination.linears if f.path != head[0]]
    every: list[LinearFact | NormFact] = [*facts, *examination.norms]
    named = {f.path: _named(f, layers) for f in every}
    names = module_names(named.values())
    path, rows, columns = embedding
    embed = declared.site(MODEL_LEVEL, EMBED, rows, _target(path, EMBED, columns, before_kv=True, shard=Shard.VOCAB))
    linears = {
        tuple(fact.path for fact in siblings): _joined(siblings, declared, division, named, names, last)
        for siblings in siblings_of(facts, division)
    }
    experts = _of_experts(examination, declared, division, layers, last)
    head_site = None
    if has_head:
        head_part = _target(head[0], HEAD, head[2], before_kv=False, shard=Shard.VOCAB, bias=head[3])
        head_site = declared.site(MODEL_LEVEL, HEAD, head[1], head_part)
    norms = {}
    for norm in examination.norms:
        where, module = named[norm.path], names[norm.path]
        parent, _, leaf = where.inner.rpartition(".")
        norms[norm.path] = NormModule(
            where.layer, module, parent, norm.size, norm.attended < last, _other(leaf, module)
        )
        declared.norms.append(norms[norm.path])
    return Sites(layers, embed, head_site, linears, norms, experts)


def _of_experts(
    examination: Examination, declared: DeclaredModules, division: Division, layers: str, last: int
) -> dict[str, dict[str, LoraSite]]:
    """The sites of experts by the path of the mixture and the name of the weight; none, if one layer has two
    mixtures, some lie in no layer, or their sizes differ, so that names would mean several things.

    Where an expert's columns of gate and of up are known, adapters may have modules for each, as others write them.
    """
    placed = [(_named(fact, layers), fact) for fact in examination.experts]
    places = {named.layer for named, _ in placed}
    if MODEL_LEVEL in places or len(places) < len(placed) or len({named.shape for named, _ in placed}) > 1:
        return {}
    found = {}
    for named, fact in placed:
        found[fact.path] = {
            name: declared.site(
                named.layer,
                f"experts.{name}",
                width,
                target(
                    f"{named.inner}.{name}",
                    outs,
                    before_kv=fact.attended < last,
                    prefix="experts",
                    parts=parts,
                    **_cut_of_experts(division, fact, name),
                ),
                experts=fact.experts,
            )
            for name, width, outs, parts in (
                (GATE_UP, fact.hidden, 2 * fact.inner, ("gate_proj", "up_proj") if fact.silu else ()),
                (DOWN, fact.inner, fact.hidden, (DOWN,)),
            )
        }
    return found


def _cut_of_experts(division: Division, fact: ExpertsFact, name: str) -> dict[str, Any]:
    """How ranks divide a weight of experts, as a declaration has it. Nothing adds up (`experts.py`) but gate and up
    that are cut by outputs, and down that is cut by inputs."""
    cut = division.parameters.get(f"{fact.path}.{name}")
    if cut is None:
        return {"shard": Shard.REPLICATED}
    if name == DOWN:
        return {"shard": Shard.ROW}
    return {"shard": Shard.COLUMN, "unit": cut.unit, "blocks": cut.blocks}


def _joined(
    siblings: Sequence[LinearFact],
    declared: DeclaredModules,
    division: Division,
    named: Mapping[str, _Named],
    names: Mapping[str, str],
    last: int,
) -> LoraSite:
    """The site of these layers. last: how many attention layers there are."""
    parts = []
    for fact in siblings:
        cut = division.cuts.get(fact.path, Cut(Shard.REPLICATED))
        part = _target(
            named[fact.path].inner,
            names[fact.path],
            fact.out_features,
            before_kv=fact.attended < last,
            bias=fact.bias,
            transposed=fact.transposed,
            shard=cut.shard,
            unit=cut.unit,
        )
        parts.append(part)
    first = siblings[0]
    name = JOINT.join(part.module for part in parts)
    return declared.site(named[first.path].layer, name, first.in_features, *parts)


def siblings_of(facts: Iterable[LinearFact], division: Division) -> list[list[LinearFact]]:
    """Linear layers of one module that read the same tensor, in the order in which they do, so that one product can
    compute them; the others alone. All or none of them have a bias. (What has a number for a name is in a list, which
    has no place for another module.)"""
    found: dict[Hashable, list[LinearFact]] = {}
    for fact in facts:
        parent, _, leaf = fact.path.rpartition(".")
        cut = division.cuts.get(fact.path, Cut(Shard.REPLICATED)).shard
        joins = parent and not leaf.isdigit() and fact.source >= 0 and not fact.transposed and cut is not Shard.ROW
        divided = cut is not Shard.REPLICATED
        key: Hashable = (parent, fact.source, fact.attended, fact.bias, divided) if joins else fact.path
        found.setdefault(key, []).append(fact)
    return list(found.values())


def module_names(modules: Iterable[_Named]) -> dict[str, str]:
    """Path → what the module is called; unique in its layer, and of one shape in all layers."""
    all_of = list(modules)
    found: dict[str, str] = {}
    for module in all_of:
        alike = [m for m in all_of if m.leaf == module.leaf]
        level = {m.layer == MODEL_LEVEL for m in alike}
        if module.leaf not in (EMBED, HEAD) and _one({m.inner for m in alike}, {m.shape for m in alike}, level):
            found[module.path] = module.leaf
            continue
        alike = [m for m in alike if m.inner == module.inner]
        found[module.path] = module.inner if _one({m.shape for m in alike}) else module.path
    return found


def _one(*sets: Collection[object]) -> bool:
    return all(len(values) == 1 for values in sets)


def _named(fact: LinearFact | NormFact | ExpertsFact, layers: str) -> _Named:
    shape: tuple[object, ...]
    if isinstance(fact, LinearFact):
        shape = (fact.in_features, fact.out_features, fact.bias, fact.transposed)
    elif isinstance(fact, ExpertsFact):
        shape = (fact.experts, fact.hidden, fact.inner, fact.silu)
    else:
        shape = (fact.size,)
    found = re.fullmatch(rf"{re.escape(layers)}\.(\d+)\.(.+)", fact.path) if layers else None
    if found is None:
        return _Named(fact.path, MODEL_LEVEL, fact.path, shape)
    return _Named(fact.path, int(found[1]), found[2], shape)


def _other(leaf: str, module: str) -> str:
    return "" if leaf == module else leaf


def _target(path: str, module: str, out_features: int, **others: Any) -> LoraSlice:
    """path: inside the layer or the model."""
    parent, _, leaf = path.rpartition(".")
    return LoraSlice(module, 0, out_features, parent, attribute=_other(leaf, module), **others)
