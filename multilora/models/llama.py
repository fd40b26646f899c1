"""Llama 2 and 3.x, and the frame of the families that resemble it (their files say what differs).

Attributes are named as in the checkpoint, so that `weights.py` finds its way by name.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from multilora.attention.base import AttentionShape
from multilora.attention.rotate import CosSin
from multilora.distributed.group import SINGLE, Group
from multilora.layers.attention import SelfAttention
from multilora.layers.context import ForwardContext
from multilora.layers.embedding import Embedding, LMHead
from multilora.layers.experts import Experts
from multilora.layers.linear import Linear
from multilora.layers.norm import RMSNorm
from multilora.layers.rotary import Rotary
from multilora.lora.sites import EMBED, HEAD, MODEL_LEVEL, DeclaredModules, Shard, target
from multilora.models.base import CausalLM
from multilora.models.config import ModelConfig, NativeConfig, native_config
from multilora.models.mlp import MLP
from multilora.models.moe import SparseMoe


def self_attention(
    config: NativeConfig, layer: int, declared: DeclaredModules, group: Group, **kind: Any
) -> SelfAttention:
    """Only k and v (and what k goes through) act on the keys and values of the layer."""
    heads = partial(target, bias=config.qkv_bias, unit=config.head_dim)
    qkv = declared.site(
        layer,
        "qkv_proj",
        config.hidden_size,
        heads("self_attn.q_proj", config.q_size, before_kv=False, shard=Shard.COLUMN),
        heads("self_attn.k_proj", config.kv_size, before_kv=True, shard=Shard.KV),
        heads("self_attn.v_proj", config.kv_size, before_kv=True, shard=Shard.KV),
    )
    o_proj = target("self_attn.o_proj", config.hidden_size, before_kv=False, shard=Shard.ROW, bias=config.o_bias)
    o = declared.site(layer, "o_proj", config.q_size, o_proj)
    head_norms = {}
    if config.qk_norm:
        for name, before_kv in (("q_norm", False), ("k_norm", True)):
            norm = declared.norm(layer, f"self_attn.{name}", config.head_dim, before_kv=before_kv)
            head_norms[name] = RMSNorm(norm, config.rms_norm_eps, **kind)
    of_site = config.weights.of_site
    qkv_linear = Linear(qkv, group=group, formats=of_site(qkv), **kind)
    o_linear = Linear(o, group=group, formats=of_site(o), **kind)
    return SelfAttention(layer, config.head_dim, qkv_linear, o_linear, **head_norms)


class DecoderLayer(nn.Module):
    """Attention and MLP, or a mixture of experts, each behind its norm."""

    def __init__(self, config: NativeConfig, layer: int, declared: DeclaredModules, group: Group, **kind: Any):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = self_attention(config, layer, declared, group, **kind)
        self.mlp: MLP | SparseMoe
        if config.moe is not None and layer in config.moe.layers:
            self.mlp = SparseMoe(config.moe, size, layer, declared, group, weights=config.weights, **kind)
        else:
            inner = config.intermediate_size
            formats, bias = config.weights, config.mlp_bias
            self.mlp = MLP("mlp", size, inner, layer, declared, group, bias=bias, weights=formats, **kind)
        first = declared.norm(layer, "input_layernorm", size, before_kv=True)
        second = declared.norm(layer, "post_attention_layernorm", size, before_kv=False)
        self.input_layernorm = RMSNorm(first, eps, group=group, **kind)
        self.post_attention_layernorm = RMSNorm(second, eps, group=group, **kind)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rope: CosSin,
        ctx: ForwardContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [tokens, hidden]. Their sum is the layer's input, and that of the results its output; x is
        this rank's share, both times."""
        x, residual = self.input_layernorm.add(x, residual, ctx)
        x = self.self_attn(x, rope, ctx)
        x, residual = self.post_attention_layernorm.add(x, residual, ctx)
        return self.mlp(x, ctx), residual


class Decoder(nn.Module):
    """The embedding, the layers and the final norm. Nothing behind the last layer acts on keys and values."""

    def __init__(self, config: NativeConfig, declared: DeclaredModules, device: torch.device, group: Group):
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": config.dtype}
        hidden = config.hidden_size
        embed = target(f"model.{EMBED}", hidden, before_kv=True, shard=Shard.VOCAB)
        table = declared.site(MODEL_LEVEL, EMBED, config.vocab_size, embed)
        self.embed_tokens = Embedding(table, group=group, **kind)
        layers = (DecoderLayer(config, i, declared, group, **kind) for i in range(config.num_layers))
        self.layers = nn.ModuleList(layers)
        norm = declared.norm(MODEL_LEVEL, "model.norm", hidden, before_kv=False)
        self.norm = RMSNorm(norm, config.rms_norm_eps, group=group, **kind)
        self.rotary = Rotary(config.rope, config.context_length, device)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, hidden], positions: int64 [tokens]. Returns [tokens, hidden]."""
        rope = self.rotary(positions)
        residual: torch.Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, rope, ctx)
        return self.norm.add(x, residual, ctx)[0]


class LlamaForCausalLM(CausalLM):
    """See `CausalLM`."""

    config: NativeConfig

    def __init__(self, config: NativeConfig, device: torch.device, group: Group = SINGLE):
        super().__init__(config, device, group)
        self.model = Decoder(config, self.declared, device, group)
        self.lm_head = self._head() if config.generates else None

    def _head(self) -> LMHead:
        config = self.config
        head = target(HEAD, config.vocab_size, before_kv=False, shard=Shard.VOCAB)
        return LMHead(
            self.declared.site(MODEL_LEVEL, HEAD, config.hidden_size, head),
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
            device=self.device,
            dtype=config.dtype,
            group=self.group,
        )

    @classmethod
    def configure(
        cls, hf: Any, *, generation: GenerationConfig | None, context_length: int | None, dtype: torch.dtype
    ) -> ModelConfig:
        """See `CausalLM`."""
        family = cls.settings(hf)
        return native_config(hf, generation=generation, family=family, context_length=context_length, dtype=dtype)

    @classmethod
    def settings(cls, hf: Any) -> dict[str, Any]:
        """The fields of `NativeConfig` that the family derives from the transformers config in its own way.

        Raises ModelUnsupported for a setting that the family would compute wrongly.
        """
        return {"qkv_bias": hf.attention_bias, "o_bias": hf.attention_bias, "mlp_bias": hf.mlp_bias}

    @property
    def capturable(self) -> bool:
        return all(module.capturable for module in self.modules() if isinstance(module, Experts))

    @property
    def attention_shape(self) -> AttentionShape:
        c = self.config
        heads = c.num_heads // self.group.size
        return AttentionShape(heads, self._kv_heads, c.head_dim, c.head_dim**-0.5, c.sliding_window)

    def embed(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        x: torch.Tensor = self.model.embed_tokens(ids, ctx)
        return x

    def forward(self, x: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        hidden: torch.Tensor = self.model(x, positions, ctx)
        return hidden

    def logits(self, hidden_rows: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        assert self.lm_head is not None, "nobody asks a model for logits that does not generate"
        logits: torch.Tensor = self.lm_head(hidden_rows, ctx)
        return logits
