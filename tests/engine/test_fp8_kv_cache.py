"""A KV cache of 8-bit floats: what transformers and PEFT say when keys and values are rounded before attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.engine_driver import EngineDriver
from fakes.models import make_tiny_model
from quantised import held_against_peft, with_adapter
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SCALES = {0: (0.04, 0.05), 1: (0.0625, 0.03)}
KINDS = {"fp8": (torch.float8_e4m3fn, 448.0), "fp8_e5m2": (torch.float8_e5m2, 57344.0)}


def rounding(kind: str, scaled: bool) -> Any:
    dtype, most = KINDS[kind]

    def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x / scale).clip(-most, most).to(dtype).float() * scale

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        k_scale, v_scale = SCALES[module.layer_idx] if scaled else (1.0, 1.0)
        return sdpa_attention_forward(module, query, rounded(key, k_scale), rounded(value, v_scale), *args, **kwargs)

    return attend


@pytest.mark.parametrize(
    ("kind", "scaled", "impl"),
    [("fp8", True, "native"), ("fp8_e5m2", False, "native"), ("fp8", True, "transformers")],
)
def test_answers_are_those_of_rounded_keys_and_values(tmp_path: Path, kind: str, scaled: bool, impl: str) -> None:
    make_tiny_model(tmp_path / "base", "llama")
    if scaled:
        file = tmp_path / "base" / "model.safetensors"
        names = {
            f"model.layers.{layer}.self_attn.{kind}_scale": torch.tensor(scale)
            for layer, pair in SCALES.items()
            for kind, scale in zip("kv", pair, strict=True)
        }
        save_file(load_file(file) | names, file, metadata={"format": "pt"})
    AttentionInterface.register("rounding", rounding(kind, scaled))
    AttentionMaskInterface.register("rounding", sdpa_mask)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.float32, attn_implementation="rounding"
        ).eval()

    config = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    models = {None: base(), "a": with_adapter(tmp_path / "a", base, 0, **config)}
    held_against_peft(tmp_path, models, 2e-2, model_impl=impl, kv_cache_dtype=kind, chunked_prefill_size=8)


def test_twice_as_many_tokens_in_the_same_arena(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "llama")
    pages = {}
    for kind in ("auto", "fp8"):
        driver = EngineDriver(tmp_path, {}, page_size=4, dtype="bfloat16", kv_cache_dtype=kind, arena_bytes=1 << 20)
        pages[kind] = driver.stats.total_pages
        driver.close()
    assert pages["fp8"] == 2 * pages["auto"]
