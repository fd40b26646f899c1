"""The scales of a checkpoint's KV cache."""

from pathlib import Path

import pytest
import torch
from fakes.models import make_tiny_model
from safetensors.torch import load_file, save_file

from multilora.errors import ModelUnsupported
from multilora.models.base import CausalLM
from multilora.models.load import make_model

AT = "model.layers.1.self_attn"


def loaded(path: Path, impl: str, **tensors: torch.Tensor) -> CausalLM:
    make_tiny_model(path, "llama")
    file = path / "model.safetensors"
    save_file(load_file(file) | {f"{AT}.{n.replace('__', '.')}": t for n, t in tensors.items()}, file)
    model = make_model(str(path), device=torch.device("cpu"), model_impl=impl, kv_cache_dtype="fp8_e5m2")
    model.load(str(path), load_format="auto", revision=None, seed=0)
    return model


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_they_are_read_wherever_they_stand(tmp_path: Path, impl: str) -> None:
    scales = {"k_scale": torch.tensor(0.5), "v_proj__v_scale": torch.tensor([0.25], dtype=torch.bfloat16)}
    model = loaded(tmp_path, impl, **scales)
    assert model.kv_scales.by_layer == ((1.0, 1.0), (0.5, 0.25))
    assert str(model.kv_scales) == "with the checkpoint's scales"
    assert model.config.kv_dtype == torch.float8_e5m2
    assert model.kv_layout(16).token_bytes == 2 * 2 * 2 * 16, "a byte for each of layers, k and v, heads, numbers"


def test_none_are_needed(tmp_path: Path) -> None:
    assert str(loaded(tmp_path, "native").kv_scales) == "without scales"


@pytest.mark.parametrize("scale", [torch.ones(2), torch.tensor(0.0), torch.tensor(float("nan"))])
def test_what_is_no_scale_is_named(tmp_path: Path, scale: torch.Tensor) -> None:
    with pytest.raises(ModelUnsupported, match=rf"{AT}\.attn\.k_scale has shape .* one scale is served"):
        loaded(tmp_path, "native", attn__k_scale=scale)
