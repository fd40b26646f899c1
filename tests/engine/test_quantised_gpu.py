"""Quantised base models and 8-bit KV caches on a GPU in bf16, beside the same on the CPU in fp32.

Other tests hold those against PEFT. MULTILORA_TEST_DEVICE=cpu tries it out without a GPU.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import ask_for_all, told
from fakes.engine_driver import EngineDriver
from fakes.models import make_adapter, make_tiny_model
from integer_definitions import awq
from quantised import write_quantised

DEVICE = os.environ.get("MULTILORA_TEST_DEVICE", "cuda")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu] + [cuda] * (DEVICE == "cuda")

two_devices = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices")
VOCAB = 512
SIZES = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "head_dim": 128}
PROMPT = torch.randint(3, VOCAB, (70,), generator=torch.Generator().manual_seed(0)).tolist()
ADAPTER = {"r": 8, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj", "down_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARE = 0.35  # of what the adapter changes: so little may rounding to bf16 change, which these models magnify
KINDS: dict[str, dict[str, Any]] = {
    "fp8": {"quantization": "fp8"},
    "fp8 in blocks": {},
    "fp8 experts": {"quantization": "fp8"},
    "fp8 experts in blocks": {},
    "awq experts": {},
    "bitsandbytes": {"quantization": "bitsandbytes"},
    "fp8 KV cache": {"kv_cache_dtype": "fp8"},
    "fp8_e5m2 KV cache": {"kv_cache_dtype": "fp8_e5m2"},
}


def in_blocks(path: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """All blocks have one scale."""
    scale = weight.abs().max() / 448
    blocks = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale_inv": scale.expand(blocks)}


def logprobs(path: Path, device: str, dtype: str, **options: Any) -> torch.Tensor:
    """Of a prompt and what follows it, with the adapter and without: decodes go one by one and together."""
    driver = EngineDriver(path / "base", {"a": path / "a"}, device=device, dtype=dtype, **options)
    try:
        rids = [ask_for_all(driver, PROMPT, name, vocab=VOCAB, max_new_tokens=1) for name in (None, "a")]
        driver.run()
        return torch.stack([told(driver.answers[rid], VOCAB)[: len(PROMPT) - 1] for rid in rids])
    finally:
        driver.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=two_devices)])
def test_a_gpu_says_what_the_cpu_says(tmp_path: Path, kind: str, ranks: int) -> None:
    if kind == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    base, model = tmp_path / "base", {"family": "llama"} | SIZES
    adapter = ADAPTER
    if "experts" in kind:
        model |= {"family": "qwen3_moe", "moe_intermediate_size": 256, "num_key_value_heads": 2}
        adapter = ADAPTER | {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    make_tiny_model(base, **model)
    make_adapter(tmp_path / "a", base, **adapter)
    if kind.endswith("in blocks"):
        config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        write_quantised(base, config, in_blocks, **model)
    if kind.startswith("awq"):
        config = {"quant_method": "awq", "bits": 4, "group_size": 32}
        write_quantised(base, config, awq, **model)
    found = logprobs(tmp_path, DEVICE, "bfloat16", tp_size=ranks, **KINDS[kind])
    exact = logprobs(tmp_path, "cpu", "float32", **KINDS[kind])
    changed = (exact[0] - exact[1]).abs().mean()
    assert (found - exact).abs().mean() < SHARE * changed
