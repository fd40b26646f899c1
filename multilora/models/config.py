"""What a base model is, as plain numbers: read from its transformers config, checked, frozen.

Everything that would be computed wrongly is refused here, by name, before any weight is fetched.
What differs between families (biases, head norms, windows) comes in from the family's file.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from transformers import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.rotary import Rope
from multilora.layers.weights.plain import PLAIN_FORMATS, WeightFormats
from multilora.params import ClassifierSettings

logger = logging.getLogger(__name__)

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One base model as this process runs it: the dtypes and `context_length` are the ones in use.

    dtype: of activations, and of weights that are not quantised. kv_dtype: of the KV cache. adapter_dtype: of packed
    adapters. weights: how those of linear layers are held. generates: it has a language-model head. classifier: its
    classification head, if it has one. pad_token_id: stands behind texts, and is never classified by.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    adapter_dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    weights: WeightFormats = PLAIN_FORMATS
    generates: bool = True
    classifier: ClassifierSettings | None = None
    pad_token_id: int | None = None

    def with_dtype(self, dtype: torch.dtype) -> Self:
        """The same model with weights, KV cache and adapters in `dtype`."""
        return replace(self, dtype=dtype, kv_dtype=dtype, adapter_dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A mixture of experts in place of the MLP of some layers.

    layers: which ones. intermediate_size: of one expert. normalised: the weights of a token's experts sum to one.
    rounded: those weights are rounded to the model's dtype. shared_size: the intermediate size of the expert that
    every token takes besides, behind a gate of its own; 0: there is none.
    """

    layers: frozenset[int]
    num_experts: int
    top_k: int
    intermediate_size: int
    normalised: bool
    rounded: bool
    shared_size: int = 0


@dataclass(frozen=True, kw_only=True)
class NativeConfig(ModelConfig):
    """A model that a file of this package computes: the Llama family."""

    intermediate_size: int
    rms_norm_eps: float
    rope: Rope
    sliding_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoeConfig | None = None

    @property
    def q_size(self) -> int:
        """Columns of the queries of all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the keys (or values) of all KV heads."""
        return self.num_kv_heads * self.head_dim


def native_config(
    hf: Any,
    *,
    generation: GenerationConfig | None,
    family: dict[str, Any],
    context_length: int | None,
    dtype: torch.dtype,
) -> NativeConfig:
    """Our config from transformers' one. family: the fields that the model's class derives.

    Raises ModelUnsupported naming the field that is not served, ConfigError for a context beyond the model's.
    """
    refuse_unsupported(hf)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return NativeConfig(
        architecture=hf.architectures[0],
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=hf.rms_norm_eps,
        rope=rope_of(hf, head_dim),
        context_length=choose_context(hf, context_length),
        dtype=dtype,
        kv_dtype=dtype,
        adapter_dtype=dtype,
        eos_token_ids=eos_ids(hf, generation),
        tie_word_embeddings=hf.tie_word_embeddings,
        **family,
    )


def refuse_unsupported(hf: Any) -> None:
    """Raise ModelUnsupported for any setting that this code would silently compute wrongly."""
    rope = hf.rope_parameters or {}
    served: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", hf.hidden_act, ("silu", "swish")),
        ("pretraining_tp", getattr(hf, "pretraining_tp", None), (None, 1)),
        ("rope_type", rope.get("rope_type"), ROPE_TYPES),
        ("partial_rotary_factor", rope.get("partial_rotary_factor"), (None, 1.0)),
    ]
    for field, value, allowed in served:
        if value not in allowed:
            raise ModelUnsupported(f"{hf.architectures[0]} with {field} = {value!r} is not supported")
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise ModelUnsupported(
            f"num_attention_heads = {hf.num_attention_heads} is no multiple of "
            f"num_key_value_heads = {hf.num_key_value_heads}"
        )


def rope_of(hf: Any, head_dim: int) -> Rope:
    """The frequencies under the checkpoint's scaling rule, by transformers' own functions."""
    rule = hf.rope_parameters["rope_type"]
    if rule == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return Rope(tuple((1.0 / hf.rope_parameters["rope_theta"] ** exponents).tolist()))
    inv_freq, scale = ROPE_INIT_FUNCTIONS[rule](hf, torch.device("cpu"))
    return Rope(tuple(inv_freq.tolist()), float(scale))


def choose_context(hf: Any, asked: int | None) -> int:
    """The context length in tokens: what was asked for, if the positions are defined that far, else the model's."""
    own = int(hf.max_position_embeddings)
    if asked is None:
        return own
    rope = hf.rope_parameters
    stretched = 0
    if rope["rope_type"] in ("linear", "yarn"):
        stretched = int(rope["factor"] * rope.get("original_max_position_embeddings", own))
    if asked > max(own, stretched):
        raise ConfigError(f"--context-length {asked} is more than the model's {max(own, stretched)}")
    return asked


def uniform_window(hf: Any) -> int | None:
    """The sliding window of a model whose layers all have the same one, or none. Mixed layers are refused."""
    kinds = set(getattr(hf, "layer_types", None) or ())
    if not kinds or kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise ModelUnsupported(
            f"{hf.architectures[0]} with layer_types of {', '.join(sorted(kinds))} is not supported: "
            "all layers must have the same kind of attention"
        )
    return int(hf.sliding_window)


def eos_ids(hf: Any, generation: GenerationConfig | None) -> tuple[int, ...]:
    """Every token id that ends a text, by generation_config.json and by config.json, in that order."""
    found: list[int] = []
    for source in (generation, hf):
        value = getattr(source, "eos_token_id", None)
        found += [value] if isinstance(value, int) else value or []
    return tuple(dict.fromkeys(found))
