"""Llama 2 and 3.x, and the frame of the families that resemble it (their files say what differs).

Attributes are named as in the checkpoint, so that `weights.py` finds its way by name.
"""

from typing import Any

import torch
from torch import nn

from multilora.attention.rotate import CosSin
from multilora.layers.attention import SelfAttention
from multilora.layers.context import ForwardContext
from multilora.layers.embedding import Embedding, LMHead
from multilora.layers.linear import GateUp, Linear
from multilora.layers.norm import RMSNorm
from multilora.layers.rotary import Rotary
from multilora.lora.sites import MODEL_LEVEL, LoraSite
from multilora.memory.kv_layout import KVLayout
from multilora.models.config import ModelConfig
from multilora.models.sites import decoder_sites


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up merged."""

    def __init__(self, gate_up_proj: GateUp, down_proj: Linear):
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x, ctx), ctx)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, sites: tuple[LoraSite, ...], device: torch.device):
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": config.dtype}
        qkv, o, gate_up, down = sites
        head_norms = {}
        if config.qk_norm:
            names = ("q_norm", "k_norm")
            head_norms = {n: RMSNorm(n, layer, config.head_dim, config.rms_norm_eps, **kind) for n in names}
        self.self_attn = SelfAttention(
            layer,
            config.head_dim,
            Linear(qkv, bias=config.qkv_bias, **kind),
            Linear(o, bias=config.o_bias, **kind),
            **head_norms,
        )
        self.mlp = MLP(GateUp(gate_up, bias=config.mlp_bias, **kind), Linear(down, bias=config.mlp_bias, **kind))
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm("input_layernorm", layer, size, eps, **kind)
        self.post_attention_layernorm = RMSNorm("post_attention_layernorm", layer, size, eps, **kind)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rope: CosSin,
        ctx: ForwardContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [tokens, hidden]. Their sum is the layer's input, and that of the results its output."""
        x, residual = self.input_layernorm.add(x, residual, ctx)
        x = self.self_attn(x, rope, ctx)
        x, residual = self.post_attention_layernorm.add(x, residual, ctx)
        return self.mlp(x, ctx), residual


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, sites: tuple[LoraSite, ...], device: torch.device):
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": config.dtype}
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **kind)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, tuple(s for s in sites if s.layer == layer), device)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm("norm", MODEL_LEVEL, config.hidden_size, config.rms_norm_eps, **kind)
        self.rotary = Rotary(config.rope, config.context_length, device)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        rope = self.rotary(positions)
        residual: torch.Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, rope, ctx)
        return self.norm.add(x, residual, ctx)[0]


class LlamaForCausalLM(nn.Module):
    """A decoder with a language-model head. Weights are allocated, not filled: see `weights.py`."""

    def __init__(self, config: ModelConfig, device: torch.device):
        super().__init__()
        self.config = config
        self.device = device
        self._sites = decoder_sites(config)
        self.model = Decoder(config, self._sites, device)
        self.lm_head = LMHead(
            self._sites[-1],
            config.vocab_size,
            config.hidden_size,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
            device=device,
            dtype=config.dtype,
        )

    @classmethod
    def settings(cls, hf: Any) -> dict[str, Any]:
        """The fields of ModelConfig that this family derives from the transformers config in its own way."""
        return {"qkv_bias": hf.attention_bias, "o_bias": hf.attention_bias, "mlp_bias": hf.mlp_bias}

    def embed(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """ids: int64 [tokens]. Returns their rows of the table, [tokens, hidden]."""
        return self.model.embed_tokens(ids, ctx)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, hidden], embedded; positions: int64 [tokens].

        Writes the new tokens' k and v, returns their hidden rows after the final norm, [tokens, hidden].
        """
        return self.model(x, positions, ctx)

    def logits(self, hidden_rows: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """hidden_rows: [rows, hidden]; the context's segments count these rows. Returns fp32 [rows, vocab]."""
        return self.lm_head(hidden_rows, ctx)

    def linear(self, layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [out, in] and bias [out] of a PEFT target module; lm_head counts as one (layer MODEL_LEVEL)."""
        if module == self.lm_head.site.name:
            return self.lm_head.weight, None
        for linear in self.model.layers[layer].modules():
            if isinstance(linear, Linear) and module in (parts := linear.parts()):
                return parts[module]["weight"], parts[module].get("bias")
        raise KeyError((layer, module))

    def lora_sites(self) -> tuple[LoraSite, ...]:
        return self._sites

    def kv_layout(self, page_size: int) -> KVLayout:
        config = self.config
        return KVLayout(config.num_layers, page_size, config.num_kv_heads, config.head_dim, config.dtype)
