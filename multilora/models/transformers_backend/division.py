"""How ranks divide a tree of transformers: its own plan for tensor parallelism, read for our sites.

A plan says of linear layers "colwise" or "rowwise", by names in which * stands for the number of a layer. Layers that
it cuts only to put their outputs together again (a merged q, k and v; a norm over all heads) are whole on every rank
here, which gives the same numbers without an exchange. Attention is divided in all layers or in none.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from multilora.lora.sites import Shard
from multilora.models.transformers_backend.probe import AttentionFact, Examination, LinearFact, ObstacleError

CUTS = {"colwise": Shard.COLUMN, "rowwise": Shard.ROW}
WHOLE = (
    *("colwise_gather_output", "rowwise_split_input"),  # transformers 5.20 and later
    *("colwise_rep", "rowwise_rep"),  # their names before
    *("replicated_with_grad_allreduce", "embedding_rowwise"),
)
"""Styles of modules that every rank has whole, or that are no linear layers."""


@dataclass(frozen=True)
class Cut:
    """How the weight of one linear layer is divided. unit: so many of its outputs belong together."""

    shard: Shard
    unit: int = 1


@dataclass(frozen=True)
class Division:
    """cuts: by the path of a linear layer; those that are missing are whole on every rank. heads: whether attention
    is divided. obstacle: why ranks cannot share the model; "": they can."""

    cuts: Mapping[str, Cut] = field(default_factory=dict)
    heads: bool = False
    obstacle: str = ""


def divide(lm: Any, plan: Mapping[str, str], prefix: str, examination: Examination) -> Division:
    """lm: the tree; plan: transformers' for it, whose names begin below `prefix`; empty: it has none."""
    try:
        return _divide(lm, plan, prefix, examination)
    except ObstacleError as e:
        return Division(obstacle=str(e))


def _divide(lm: Any, plan: Mapping[str, str], prefix: str, examination: Examination) -> Division:
    if not plan:
        raise ObstacleError("transformers has no plan that divides it")
    for name, style in plan.items():
        if style not in CUTS and style not in WHOLE:
            raise ObstacleError(f"transformers' plan has {style!r} for {name}")
    by_path = {a.path: a for a in examination.attentions}
    cuts = {}
    for linear in examination.linears:
        shard = CUTS.get(plan.get(_pattern(linear.path, prefix), ""))
        if shard is Shard.COLUMN:
            cuts[linear.path] = _columns(linear, by_path.get(linear.path.rpartition(".")[0]))
        elif shard is not None:
            cuts[linear.path] = Cut(shard)
    if not cuts:
        raise ObstacleError("transformers' plan divides none of its layers")
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ObstacleError("its head has a bias")
    heads = {_divides_heads(path, cuts) for path in by_path}
    if len(heads) > 1:
        raise ObstacleError("transformers' plan divides the attention of some of its layers only")
    divided = heads.pop()
    if divided:
        for fact in by_path.values():
            _check_heads(lm, fact, examination, cuts)
    return Division(cuts, divided)


def _pattern(path: str, prefix: str) -> str:
    return re.sub(r"\d+", "*", path.removeprefix(f"{prefix}."))


def _columns(linear: LinearFact, attention: AttentionFact | None) -> Cut:
    """attention: whose layer it is part of."""
    if attention is None:
        return Cut(Shard.COLUMN)
    of_keys = {attention.kv_heads * dim for dim in (attention.key_dim, attention.value_dim)}
    if attention.kv_heads < attention.heads and linear.out_features in of_keys:
        return Cut(Shard.KV, linear.out_features // attention.kv_heads)
    if linear.out_features % attention.heads:
        raise ObstacleError(f"transformers' plan cuts {linear.path}, whose outputs are not those of whole heads")
    return Cut(Shard.COLUMN, linear.out_features // attention.heads)


def _divides_heads(path: str, cuts: Iterable[str]) -> bool:
    return any(cut.startswith(f"{path}.") for cut in cuts)


def _check_heads(lm: Any, fact: AttentionFact, examination: Examination, cuts: Mapping[str, Cut]) -> None:
    """Raise ObstacleError if an attention layer, called with some of its heads, needs something of all of them."""
    norms = {norm.path: norm.size for norm in examination.norms}
    for name, _ in lm.get_submodule(fact.path).named_parameters():
        owner = f"{fact.path}.{name}".rpartition(".")[0]
        if owner not in cuts and norms.get(owner) not in (fact.key_dim, fact.value_dim):
            raise ObstacleError(f"its attention has {name} of all heads, which transformers' plan divides")
