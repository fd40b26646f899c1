from pathlib import Path

import pytest
import torch
from fakes.models import make_tiny_model

from multilora.errors import ConfigError
from multilora.layers.weights.base import ExpertsWeight
from multilora.models.load import make_model, read_config


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "../nothing"])
def test_a_path_that_is_no_directory_is_not_asked_of_the_hub(path):
    with pytest.raises(ConfigError, match="no such directory"):
        read_config(path)


def test_a_directory_without_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(str(tmp_path))


def test_a_quantised_model_takes_the_bytes_that_it_is_held_in(tmp_path: Path) -> None:
    """Seven matrices in each of two layers; the tables and norms stay what they are."""
    config = make_tiny_model(tmp_path, "llama", dtype="bfloat16").config
    meta, kind = torch.device("meta"), {"dtype": "bfloat16"}
    plain = make_model(str(tmp_path), device=meta, **kind).weight_bytes
    held = make_model(str(tmp_path), device=meta, quantization="fp8", **kind).weight_bytes
    hidden, kv, inner = config.hidden_size, 32, config.intermediate_size
    numbers = 2 * (2 * hidden * (hidden + kv) + 3 * hidden * inner)
    rows = 2 * (2 * hidden + 2 * kv + 2 * inner + hidden)
    assert held == plain - numbers + 4 * rows


def test_noise_for_a_quantised_model(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "qwen2")
    model = make_model(str(tmp_path), device=torch.device("cpu"), quantization="fp8")
    model.load(str(tmp_path), load_format="dummy", revision=None, seed=0)
    weight, bias = model.base_weight(1, "q_proj")
    assert 0.01 < weight.std() < 0.03
    assert bias is not None and bias.tolist() == [1.0] * 64


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_noise_for_experts(tmp_path: Path, quantization: str | None) -> None:
    make_tiny_model(tmp_path, "qwen3_moe")
    model = make_model(str(tmp_path), device=torch.device("cpu"), quantization=quantization)
    model.load(str(tmp_path), load_format="dummy", revision=None, seed=0)
    found = [module for module in model.modules() if isinstance(module, ExpertsWeight)]
    assert len(found) == 4
    for weight in found:
        weight.check_filled()
        assert 0.01 < weight.dequantised(weight.rows_of(weight.experts - 1)).std() < 0.03
