"""What a model that runs through transformers' modules is, as plain numbers: from its config and one examination."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from multilora.attention.base import AttentionShape
from multilora.errors import ConfigError, ModelUnsupported
from multilora.models.config import ModelConfig, eos_ids
from multilora.models.transformers_backend.division import Division, divide, plan_of
from multilora.models.transformers_backend.probe import AttentionFact, Examination, examine
from multilora.models.transformers_backend.refused import REFUSED
from multilora.models.transformers_backend.rotary import check_context, moving_limit, rope_rules
from multilora.models.transformers_backend.tree import Tree

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TreeConfig(ModelConfig):
    """A model that transformers' own modules compute. hf: its config there, which must not be changed; division:
    among ranks."""

    hf: Any
    examination: Examination
    division: Division
    attention: AttentionShape


def tree_config(
    hf: Any, *, generation: GenerationConfig | None, context_length: int | None, dtype: torch.dtype
) -> TreeConfig:
    """Our config from transformers' one. Raises ModelUnsupported saying what keeps the model from being served,
    ConfigError for a context beyond the model's."""
    architecture = _architecture(hf)
    _refuse_settings(hf, architecture)
    tree = Tree(hf, architecture, dtype)
    found = examine(tree, architecture)
    shape = attention_shape(found.attentions, architecture)
    embedding = tree.lm.get_submodule(tree.embedding_path)
    rows, hidden = embedding.weight.shape
    if rows != hf.vocab_size:
        what = f"its embedding has {rows} rows for {hf.vocab_size} tokens"
        raise ModelUnsupported(f"{architecture} is not supported: {what}")
    return TreeConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hidden,
        num_layers=len(found.attentions),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        context_length=choose_context(hf, context_length),
        dtype=dtype,
        kv_dtype=dtype,
        adapter_dtype=dtype,
        eos_token_ids=eos_ids(hf, generation),
        tie_word_embeddings=tree.lm.get_submodule(tree.head_path).weight is embedding.weight,
        hf=copy.deepcopy(hf),
        examination=found,
        division=divide(tree.lm, plan_of(hf), tree.lm.base_model_prefix, found),
        attention=shape,
    )


def _architecture(hf: Any) -> str:
    names = list(hf.architectures or ())
    if len(names) != 1:
        found = ", ".join(names) or f"unknown (model_type {hf.model_type!r})"
        raise ModelUnsupported(f"architecture {found} is not supported; docs/models.md lists what is served")
    return str(names[0])


def _refuse_settings(hf: Any, architecture: str) -> None:
    """Raise ModelUnsupported for what an examination cannot see."""
    if architecture in REFUSED:
        raise ModelUnsupported(f"{architecture} is not supported: {REFUSED[architecture]}")
    if getattr(hf, "is_encoder_decoder", False):
        raise ModelUnsupported(f"{architecture} is not supported: it is an encoder with a decoder")
    if hf.get_text_config(decoder=True) is not hf:
        raise ModelUnsupported(f"{architecture} is not supported: it is more than a text decoder (multimodal)")


def attention_shape(layers: tuple[AttentionFact, ...], architecture: str) -> AttentionShape:
    """What all layers have in common, and their windows. Raises ModelUnsupported where pages cannot hold them."""
    first = layers[0]
    for what, values in (
        ("heads", {a.heads for a in layers}),
        ("KV heads", {a.kv_heads for a in layers}),
        ("head sizes", {(a.key_dim, a.value_dim) for a in layers}),
        ("softcaps", {a.softcap for a in layers}),
    ):
        if len(values) > 1:
            raise ModelUnsupported(f"{architecture} is not supported: its layers have different {what}")
    windows = tuple(a.window for a in layers)
    alike = len(set(windows)) == 1
    return AttentionShape(
        num_heads=first.heads,
        num_kv_heads=first.kv_heads,
        head_dim=max(first.key_dim, first.value_dim),
        scale=first.scale,
        sliding_window=first.window if alike else None,
        layer_windows=() if alike else windows,
        softcap=first.softcap,
        sinks=any(a.sinks for a in layers),
    )


def choose_context(hf: Any, asked: int | None) -> int:
    """The context length in tokens: what was asked for, if the positions are defined that far, else the model's."""
    own = getattr(hf, "max_position_embeddings", None)
    if own is None:
        if asked is None:
            raise ConfigError("the model's config names no longest text; say --context-length")
        return asked
    own, limit = int(own), moving_limit(hf)
    if asked is None:
        if limit is not None and limit < own:
            logger.info("context: %d tokens; up to %d with --context-length", limit, own)
        return min(own, limit or own)
    check_context(hf, asked)
    stretched = [
        int(rule["factor"] * (rule.get("original_max_position_embeddings") or own))
        for rule in rope_rules(hf)
        if rule.get("rope_type") in ("linear", "yarn")
    ]
    most = max([own, *stretched])
    if asked > most:
        raise ConfigError(f"--context-length {asked} is more than the model's {most}")
    return asked
