"""Rotary frequencies that would follow the longest text of a batch stand still, at the right values."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from multilora.errors import ConfigError
from multilora.models.transformers_backend.rotary import check_context, hold_still, moving_limit

LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def phi3(**fields: Any) -> Phi3Config:
    return Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        rope_parameters=dict(LONG),
        pad_token_id=0,
        **fields,
    )


def frequencies(rotary: Any, last: int) -> torch.Tensor:
    """What the embedding turns by in a batch whose last position is this one, at positions below."""
    cos, _ = rotary(torch.zeros(1, 1), torch.tensor([[3, 5, last]]))
    found: torch.Tensor = cos[0, :2]
    return found


@pytest.mark.parametrize(("context", "like"), [(32, 5), (256, 200)])
def test_longrope_is_that_of_the_context_at_every_length(context: int, like: int) -> None:
    config = phi3()
    want = frequencies(Phi3RotaryEmbedding(config), like)
    rotary = Phi3RotaryEmbedding(config)
    hold_still(rotary, context)
    for last in (5, 31, 32, 200):
        torch.testing.assert_close(frequencies(rotary, last), want)


def test_limits() -> None:
    assert moving_limit(phi3()) == 32
    assert moving_limit(LlamaConfig(max_position_embeddings=128)) is None
    dynamic = LlamaConfig(max_position_embeddings=128, rope_parameters=DYNAMIC)
    assert moving_limit(dynamic) == 128
    check_context(dynamic, 128)
    check_context(phi3(), 256)
    with pytest.raises(ConfigError, match=r"--context-length 129 is more than 128.*dynamic NTK"):
        check_context(dynamic, 129)
