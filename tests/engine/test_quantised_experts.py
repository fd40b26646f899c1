"""Mixtures whose experts are in FP8, under adapters in 16 bit: the answers are those of transformers and PEFT.

Their experts there compute the definition, written a second time; adapters act on attention, the router and experts,
and share a batch with the base model, on one rank and where two divide the experts.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_tiny_model
from fp8_definitions import FLOATS, FP8, TOKENS, by_row, compressed, from_blocks, from_tensor, in_blocks, rounded
from quantised import (
    Tensors,
    decoder_linears,
    held_against_peft,
    plain_twin,
    round_at,
    round_experts,
    with_adapter,
    write_quantised,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "experts": {"r": 4, "target_modules": ["o_proj"], "target_parameters": BOTH},
    "router": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.gate.weight", BOTH[1]],
    },
}
SIZES = {"hidden_size": 256, "num_attention_heads": 4}
CLOSE, TYPICAL = 0.2, 1e-4
"""How far logprobs may be from PEFT's: where a number falls on the other side of a rounding, and elsewhere."""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare(path: Path, base: Callable[[], Any], ranks: tuple[int, ...] = (1, 2), **options: Any) -> None:
    models = {name: with_adapter(path / name, base, i, **c) for i, (name, c) in enumerate(ADAPTERS.items())}
    for size in ranks:
        held_against_peft(path, {None: base(), **models}, CLOSE, typical=TYPICAL, tp_size=size, **options)


CHECKPOINTS: dict[str, tuple[dict[str, Any], Any, Callable[[Tensors], Any], dict[str, Any]]] = {
    "qwen3_moe in blocks": (
        FP8
        | {"weight_block_size": [128, 128]}
        | {"modules_to_not_convert": ["lm_head", ".*self_attn", "shared_expert"]},
        in_blocks,
        from_blocks,
        SIZES | {"family": "qwen3_moe", "moe_intermediate_size": 128},
    ),
    "mixtral by rows": (
        compressed("float-quantized", FLOATS, TOKENS) | {"ignore": ["lm_head", "re:.*self_attn", "re:.*mlp.gate"]},
        by_row,
        from_tensor,
        {"family": "mixtral", "num_local_experts": 6},
    ),
    "qwen2_moe by rows": (
        compressed("float-quantized", FLOATS, TOKENS)
        | {"ignore": ["lm_head", "re:.*self_attn", "re:.*shared_expert.*"]},
        by_row,
        from_tensor,
        {"family": "qwen2_moe"},
    ),
}


@pytest.mark.parametrize("row", CHECKPOINTS)
def test_a_checkpoint_with_quantised_experts(tmp_path: Path, row: str) -> None:
    config, quantise, dequantise, model = CHECKPOINTS[row]
    write_quantised(tmp_path / "base", config, quantise, ("self_attn.", "shared_expert"), **model)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    # attention and shared experts stay in fp32, so that ranks, which round their part of a row, say the same
    assert sum(".experts." in name and t.dtype == torch.float8_e4m3fn for name, t in tensors.items()) == 2 * 6 * 3

    def weights(path: str) -> Any:
        return dequantise({n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")})

    compare(tmp_path, lambda: plain_twin(tmp_path / "base", weights))


def rounding(path: Path, *, all_linears: bool) -> Any:
    """transformers' model with experts that compute in FP8, and all other linear layers but the router or none."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, module in decoder_linears(model).items() if all_linears else ():
        if not name.endswith("shared_expert_gate"):
            module.weight.data = rounded(module.weight.data)
            round_at(module, rounded)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.data = rounded(weight.data)
        round_experts(experts, rounded)
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_are_quantised_while_they_are_loaded(tmp_path: Path, family: str) -> None:
    """Routers stay what they are. Ranks would round their parts of other modules' inputs, each for itself."""
    make_tiny_model(tmp_path / "base", family)
    compare(tmp_path, lambda: rounding(tmp_path / "base", all_linears=True), (1,), quantization="fp8")


@pytest.mark.parametrize("fused", [False, True])
def test_experts_alone_are_quantised_while_they_are_loaded(tmp_path: Path, fused: bool) -> None:
    """From three matrices for each expert, or two tensors for all."""
    model = make_tiny_model(tmp_path / "plain", "qwen3_moe", mlp_only_layers=[])
    model.save_pretrained(tmp_path / "base", save_original_format=not fused)
    written = json.loads((tmp_path / "base" / "config.json").read_text())
    config = FP8 | {"is_checkpoint_fp8_serialized": False, "modules_to_not_convert": [".*self_attn"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    names = load_file(tmp_path / "base" / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in names) == fused
    compare(tmp_path, lambda: rounding(tmp_path / "plain", all_linears=False))
