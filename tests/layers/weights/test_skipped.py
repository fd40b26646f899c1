"""Patterns of modules that stay in 16 bit, as transformers understands them."""

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from multilora.layers.weights.skipped import ends_with, skips

PATHS = [
    f"model.layers.{layer}.{module}"
    for layer in (1, 11)
    for module in ("self_attn.q_proj", "mlp.gate", "mlp.gate_proj", "mlp.experts.3.up_proj")
]


@pytest.mark.parametrize(
    "pattern",
    ["model.layers.1", "model.layers.1.mlp.gate", "mlp.gate", "gate", "q_proj", r"model\.layers\..*gate", "lm_head"],
)
def test_as_transformers(pattern: str) -> None:
    assert [skips([pattern])(path) for path in PATHS] == [not should_convert_module(p, [pattern]) for p in PATHS]


def test_none() -> None:
    assert not any(skips(None)(path) for path in PATHS)
    assert skips(["*mlp["])("model.*mlp[")


def test_ends_and_the_older_names_of_mixtral() -> None:
    inside = ends_with(["self_attn.q_proj", "block_sparse_moe.experts.3.w3", "block_sparse_moe.gate"])
    assert [path for path in PATHS if inside(path)] == [PATHS[0], PATHS[3], PATHS[4], PATHS[7]]
    first = ends_with(["block_sparse_moe.experts.1.w1"])
    assert first("model.layers.0.mlp.experts.1.gate_proj")
    assert not first("model.layers.0.mlp.experts.11.gate_proj") and not first("model.layers.0.mlp.experts.1.up_proj")
