"""Patterns of modules that stay in 16 bit, as transformers understands them."""

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from multilora.errors import ModelUnsupported
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


@pytest.mark.parametrize(
    "patterns",
    [
        ["(lm_head)", r"model\.layers\.(\d)\1\..*"],
        ["(lm_head)", r"(model\.)?(?(1)layers\.11\..*|nothing)"],
        [r"model\.layers\.(?P<n>\d+)\.mlp\.gate", r"model\.layers\.(?P<n>1)\..*"],
        ["gate", "model.layers.1", r"model\.layers\.\d\d\.self_attn", "lm_head|mlp"],
    ],
    ids=["a group by number", "a condition", "a name twice", "without groups"],
)
def test_several_as_transformers(patterns: list[str]) -> None:
    skipped = skips(patterns)
    assert [skipped(path) for path in PATHS] == [not should_convert_module(p, patterns) for p in PATHS]


def test_flags_inside_a_pattern_are_refused() -> None:
    with pytest.raises(ModelUnsupported, match=r"the pattern '\(\?i\)gate' is not supported"):
        skips(["lm_head", "(?i)gate"])


def test_none() -> None:
    assert not any(skips(None)(path) for path in PATHS)
    assert skips(["*mlp["])("model.*mlp[")


def test_ends_and_the_older_names_of_mixtral() -> None:
    inside = ends_with(["self_attn.q_proj", "block_sparse_moe.experts.3.w3", "block_sparse_moe.gate"])
    assert [path for path in PATHS if inside(path)] == [PATHS[0], PATHS[3], PATHS[4], PATHS[7]]
    first = ends_with(["block_sparse_moe.experts.1.w1"])
    assert first("model.layers.0.mlp.experts.1.gate_proj")
    assert not first("model.layers.0.mlp.experts.11.gate_proj") and not first("model.layers.0.mlp.experts.1.up_proj")
