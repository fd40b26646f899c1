"""Which quantised base models are served; what is not is refused by its name, from the config alone."""

from typing import Any

import pytest

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.weights.methods import METHODS, weight_formats
from multilora.layers.weights.plain import PLAIN, PLAIN_FORMATS

FP8 = {"quant_method": "fp8"}


def test_a_plain_checkpoint() -> None:
    assert weight_formats({}, None) is PLAIN_FORMATS
    assert PLAIN_FORMATS.choose("model.layers.0.mlp.up_proj") is PLAIN


@pytest.mark.parametrize("asked", [None, "fp8"])
def test_the_checkpoint_says_how_it_is_quantised(asked: str | None) -> None:
    config = FP8 | {"weight_block_size": [64, 32], "modules_to_not_convert": ["lm_head", "model.layers.0"]}
    found = weight_formats({"quantization_config": config}, asked)
    assert found.name == "fp8 in blocks of 64 x 32, activations dynamic"
    assert found.choose("model.layers.0.mlp.up_proj") is PLAIN
    assert found.choose("model.layers.1.mlp.up_proj").name == found.name


def test_what_is_quantised_while_it_is_loaded() -> None:
    found = weight_formats({}, "fp8")
    assert found.choose("model.layers.0.mlp.gate") is PLAIN, "a router"
    assert found.choose("model.layers.0.mlp.gate_proj").name == "fp8 by rows, activations dynamic"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq' is not supported; served: " + ", ".join(METHODS)),
        ({"bits": 3}, r"quant_method '\(none\)' is not supported"),
        ("fp8", "quantization_config of config.json is 'fp8', expected an object"),
        (
            FP8 | {"activation_scheme": "x"},
            "activation_scheme = 'x' is not supported; served: 'dynamic', 'static'",
        ),
        (FP8 | {"modules_to_convert": ["embed"]}, r"modules_to_convert = \['embed'\] is not supported"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size = \[128\]: expected two sizes"),
        (FP8 | {"weight_block_size": [64, 64], "activation_scheme": "static"}, "'static' with blocks"),
        (FP8 | {"fmt": "e5m2"}, "fmt = 'e5m2' is not supported"),
    ],
)
def test_what_is_not_served_is_named(config: Any, said: str) -> None:
    with pytest.raises(ModelUnsupported, match=said):
        weight_formats({"quantization_config": config}, None)


def test_a_checkpoint_is_not_quantised_twice() -> None:
    with pytest.raises(ConfigError, match="--quantization other: the checkpoint is already quantised, by fp8"):
        weight_formats({"quantization_config": FP8}, "other")
