"""Rotation against transformers, and its defining property."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from multilora.attention.rotate import rotate
from multilora.layers.rotary import Rotary
from multilora.models.config import rope_of

RULES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}


def make_rotary(rule: str) -> tuple[Rotary, LlamaConfig]:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": rule, "rope_theta": 10000.0} | RULES[rule],
    )
    return Rotary(rope_of(config, 16), 512, torch.device("cpu")), config


@pytest.mark.parametrize("rule", RULES)
def test_equals_transformers(rule: str) -> None:
    rotary, config = make_rotary(rule)
    positions = torch.tensor([0, 1, 2, 100, 511, 7])
    q = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    want, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(rotate(q, *rotary(positions)), want[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_scores_depend_on_the_distance_only() -> None:
    rotary, _ = make_rotary("default")
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).unbind()

    def score(i: int, j: int) -> torch.Tensor:
        return (rotate(q, *rotary(torch.tensor([i]))) * rotate(k, *rotary(torch.tensor([j])))).sum()

    torch.testing.assert_close(score(9, 4), score(309, 304), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(score(9, 4), score(9, 5), atol=1e-3)


def test_dtype_is_kept() -> None:
    rotary, _ = make_rotary("default")
    x = torch.randn(3, 2, 16).bfloat16()
    assert rotate(x, *rotary(torch.arange(3))).dtype == torch.bfloat16
