"""What is recognised as a part of ours, and what is not, by what transformers' code computes on stand-ins."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, LlamaConfig, PhiConfig
from transformers.models.cohere.modeling_cohere import CohereAttention, CohereConfig, CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi.modeling_phi import PhiMLP

from multilora.layers.norm import NormForm
from multilora.models.transformers_backend.common_parts import (
    gated_mlp,
    rms_norm_like,
    takes_whole_heads,
    with_rotation,
)

HALF = torch.bfloat16


class Clamped(LlamaRMSNorm):
    """Differs from its parent in large numbers only."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.clamp(-100, 100))


@pytest.mark.parametrize(
    ("norm", "dtype", "found"),
    [
        (LlamaRMSNorm(32, 1e-5), HALF, (1e-5, NormForm.ROUNDED)),
        (LlamaRMSNorm(32, 1e-6), torch.float32, (1e-6, NormForm.ROUNDED)),
        (Olmo2RMSNorm(32, 1e-6), HALF, (1e-6, NormForm.WIDE)),
        (Gemma2RMSNorm(32, 1e-6), HALF, (1e-6, NormForm.ONE_PLUS)),
        (Gemma2RMSNorm(32, 1e-6), torch.float32, (1e-6, NormForm.ONE_PLUS)),
        (CohereLayerNorm(32, 1e-5), HALF, None),
        (nn.LayerNorm(32, bias=False), HALF, None),
        (Clamped(32, 1e-5), HALF, None),
    ],
)
def test_norms(norm: nn.Module, dtype: torch.dtype, found: tuple[float, NormForm] | None) -> None:
    assert rms_norm_like(norm.to("meta"), dtype) == found


def test_an_eps_of_another_size_is_not_taken_for_the_norm_s() -> None:
    norm: Any = LlamaRMSNorm(32, 1e-5)
    norm.another, norm.variance_epsilon = 1e-5, 1e-6
    assert rms_norm_like(norm, torch.float32) == (1e-6, NormForm.ROUNDED)


LLAMA = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)


class Swapped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Residual(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Chosen(LlamaMLP):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * super().forward(x)


class Limited(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).clamp(max=7.0), self.up_proj(x).clamp(-7.0, 7.0)
        return self.down_proj(self.act_fn(gate) * up)


class Wide(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((self.act_fn(gate.float()) * up.float()).to(x.dtype))


@pytest.mark.parametrize(
    ("mlp", "found"),
    [
        (LlamaMLP(LLAMA), ("gate_proj", "up_proj", "down_proj")),
        (Swapped(LLAMA), ("up_proj", "gate_proj", "down_proj")),
        (Residual(LLAMA), None),
        (Chosen(LLAMA), None),
        (Limited(LLAMA), None),
        (Gemma2MLP(Gemma2Config(hidden_size=16, intermediate_size=24)), None),  # gelu
        (PhiMLP(PhiConfig(hidden_size=16, intermediate_size=24)), None),
        (LlamaAttention(LLAMA, 0), None),
    ],
)
def test_gated_mlps(mlp: nn.Module, found: tuple[str, str, str] | None) -> None:
    for dtype in (torch.float32, HALF):
        assert gated_mlp(mlp.to("meta"), dtype) == found


def test_a_gated_mlp_that_rounds_elsewhere_is_ours_in_fp32_only() -> None:
    mlp = Wide(LLAMA)
    assert gated_mlp(mlp, torch.float32) == ("gate_proj", "up_proj", "down_proj")
    assert gated_mlp(mlp, HALF) is None


def test_a_rotation_is_replaced_in_one_layer_and_nowhere_else() -> None:
    layer, other = LlamaAttention(LLAMA, 0), LlamaAttention(LLAMA, 1)
    before, called = modeling_llama.apply_rotary_pos_emb, list[int]()

    def replace(rotation: Any) -> Any:
        assert rotation is before
        return lambda q, k, _cos, _sin: called.append(q.shape[-1]) or (q, k)

    forward = with_rotation(layer, replace)
    assert forward is not None
    x, half = torch.randn(1, 3, 16), torch.randn(2, 1, 3, 2)
    angles = torch.cat((half, half), dim=-1).unbind()
    with torch.inference_mode():
        turned = layer(x, position_embeddings=angles, attention_mask=None)[0]
        still = forward(x, position_embeddings=angles, attention_mask=None)[0]
        assert called == [4] and not torch.allclose(turned, still)
        other(x, position_embeddings=angles, attention_mask=None)
    assert called == [4] and modeling_llama.apply_rotary_pos_emb is before


def test_rotations_of_another_kind_stay() -> None:
    config = CohereConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2)
    assert with_rotation(CohereAttention(config, 0), lambda rotation: rotation) is None  # pairs of neighbours
    assert with_rotation(nn.Linear(2, 2), lambda rotation: rotation) is None


def test_only_whole_heads_are_left_to_attention() -> None:
    q, k, angle = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 8)
    assert takes_whole_heads((q, k, angle, angle), {}, 8)
    assert not takes_whole_heads((q, k, angle, angle), {}, 16)
    assert not takes_whole_heads((q, k, angle[..., :4], angle[..., :4]), {}, 8)
    assert not takes_whole_heads((q, k, angle, angle), {"unsqueeze_dim": 2}, 8)
    assert not takes_whole_heads((q, k, angle, angle, 2), {}, 8)
