"""How ranks divide a tree of transformers: its own plan for tensor parallelism, or one of ours, read for our sites.

A plan says of linear layers "colwise" or "rowwise", by names in which * stands for the number of a layer. Layers that
it cuts only to put their outputs together again (a merged q, k and v; a norm over all heads) are whole on every rank
here, which gives the same numbers without an exchange. Attention is divided in all layers or in none. Experts are
divided by the inner width of each, where the plan says so of all their parameters (`experts.py`).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from multilora.lora.sites import Shard
from multilora.models.transformers_backend.experts import ONCE, PARAMETERS, SUMMED, expert_cuts, mixtures
from multilora.models.transformers_backend.parameters import ParameterCut
from multilora.models.transformers_backend.probe import AttentionFact, Examination, LinearFact, ObstacleError

CUTS = {"colwise": Shard.COLUMN, "rowwise": Shard.ROW}
WHOLE = (
    *("colwise_gather_output", "rowwise_split_input"),  # transformers 5.20 and later
    *("colwise_rep", "rowwise_rep"),  # their names before
    *("replicated_with_grad_allreduce", "embedding_rowwise"),
    "mla_kv_a_proj",  # another gradient
    "local_params",  # of modules some of whose parameters are divided
)
"""Styles of modules that every rank has whole, or that are no linear layers."""

PLANS: Mapping[str, Mapping[str, str]] = {
    "gpt_oss": {
        **{f"layers.*.self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj", "sinks")},
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts": SUMMED,
        "layers.*.mlp.experts.gate_up_proj": "paired_rowwise",
        "layers.*.mlp.experts.gate_up_proj_bias": "paired_rowwise",
        "layers.*.mlp.experts.down_proj": "colwise",
        "layers.*.mlp.experts.down_proj_bias": ONCE,
    },
}
"""Plans of ours by model_type, for what transformers' own divides nothing of."""


@dataclass(frozen=True)
class Cut:
    """How the weight of one linear layer is divided. unit: so many of its outputs belong together."""

    shard: Shard
    unit: int = 1


@dataclass(frozen=True)
class Division:
    """cuts: by the path of a linear layer; those that are missing are whole on every rank. parameters: of experts and
    of attention heads, by their paths, in the same way. heads: whether attention is divided. obstacle: why ranks
    cannot share the model; "": they can."""

    cuts: Mapping[str, Cut] = field(default_factory=dict)
    parameters: Mapping[str, ParameterCut] = field(default_factory=dict)
    heads: bool = False
    obstacle: str = ""


def plan_of(hf: Any) -> Mapping[str, str]:
    """Styles by the names of modules; empty: there is no plan. hf: transformers' config."""
    return PLANS.get(hf.model_type) or hf.base_model_tp_plan or {}


def divide(lm: Any, plan: Mapping[str, str], prefix: str, examination: Examination) -> Division:
    """lm: the tree; plan: for it, with names that begin below `prefix`; empty: it has none."""
    try:
        return _divide(lm, plan, prefix, examination)
    except ObstacleError as e:
        return Division(obstacle=str(e))


def _divide(lm: Any, plan: Mapping[str, str], prefix: str, examination: Examination) -> Division:
    if not plan:
        raise ObstacleError("transformers has no plan that divides it")

    def style(path: str) -> str:
        return plan.get(_pattern(path, prefix), "")

    _check_styles(lm, plan, prefix)
    by_path = {a.path: a for a in examination.attentions}
    cuts = {}
    for linear in examination.linears:
        shard = CUTS.get(style(linear.path))
        if shard is Shard.COLUMN:
            cuts[linear.path] = _columns(linear, by_path.get(linear.path.rpartition(".")[0]))
        elif shard is not None:
            cuts[linear.path] = Cut(shard)
    parameters = expert_cuts(lm, style, {fact.path for fact in examination.experts})
    if not cuts and not parameters:
        raise ObstacleError("transformers' plan divides none of its layers")
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ObstacleError("its head has a bias")
    heads = {_divides_heads(path, cuts) for path in by_path}
    if len(heads) > 1:
        raise ObstacleError("transformers' plan divides the attention of some of its layers only")
    divided = heads.pop()
    if divided:
        for fact in by_path.values():
            parameters |= _of_heads(lm, fact, style)
            _check_heads(lm, fact, examination, {**cuts, **parameters}, style)
    return Division(cuts, parameters, divided)


def _check_styles(lm: Any, plan: Mapping[str, str], prefix: str) -> None:
    """Raise ObstacleError naming what the plan asks for and ranks do not do. Of what the tree lacks it may ask
    anything."""
    known = {_pattern(path, prefix) for path, _ in (*lm.named_modules(), *lm.named_parameters())}
    of_experts = {}
    for path, module in mixtures(lm):
        of_experts[_pattern(path, prefix)] = {SUMMED}
        names = [_pattern(f"{path}.{name}", prefix) for name, _ in module.named_parameters()]
        of_experts |= {name: {*PARAMETERS, ONCE} for name in names}
    for name, style in plan.items():
        done = style in CUTS or style in WHOLE or style in of_experts.get(name, ())
        if name in known and not done:
            raise ObstacleError(f"transformers' plan has {style!r} for {name}")


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


def _of_heads(lm: Any, fact: AttentionFact, style: Callable[[str], str]) -> dict[str, ParameterCut]:
    """Parameters of an attention layer itself that have a number, or a row of its width, for each of its heads."""
    units = {fact.heads * unit: unit for unit in (1, fact.key_dim, fact.value_dim)}
    return {
        f"{fact.path}.{name}": ParameterCut(-1, unit=units[len(param)])
        for name, param in lm.get_submodule(fact.path).named_parameters(recurse=False)
        if style(f"{fact.path}.{name}") == "colwise" and param.dim() == 1 and len(param) in units
    }


def _check_heads(
    lm: Any, fact: AttentionFact, examination: Examination, cuts: Iterable[str], style: Callable[[str], str]
) -> None:
    """Raise ObstacleError if an attention layer, called with some of its heads, needs something of all of them.

    cuts: the paths of all linear layers and parameters that are divided.
    """
    linears = [linear for linear in examination.linears if linear.path.startswith(f"{fact.path}.")]
    # Latent rows are computed from the layer's and read by its divided layers: they know no heads.
    latent = {n.in_features for n in linears if style(n.path) == "colwise" and n.source != linears[0].source}
    whole = {norm.path for norm in examination.norms if norm.size in {fact.key_dim, fact.value_dim, *latent}}
    whole |= {n.path for n in linears if n.out_features in latent or style(n.path) == "mla_kv_a_proj"}
    for name, _ in lm.get_submodule(fact.path).named_parameters():
        path = f"{fact.path}.{name}"
        owner = path.rpartition(".")[0]
        if not {path, owner} & {*cuts, *whole}:
            raise ObstacleError(f"its attention has {name} of all heads, which transformers' plan divides")
