"""Quantised base models under adapters in 16 bit: the answers are those of transformers and PEFT over the same base.

The base is computed there by definitions written here for the second time. Adapters, one with DoRA, share a batch
with the base model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clear_answers import clear_answer
from exactness import ask_for_all, told
from fakes.engine_driver import EngineDriver
from fakes.models import make_tiny_model
from quantised import Tensors, decoder_linears, plain_twin, round_at, with_adapter, write_quantised
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

VOCAB = 101
NEW_TOKENS = 6
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    "dora": {"r": 4, "target_modules": ["k_proj", "o_proj", "gate_proj"], "use_dora": True},
    "ends": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["gate_proj", "lm_head"]},
}
Dequantise = Callable[[Tensors], tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clip(-448, 448).to(torch.float8_e4m3fn)


def largest(x: torch.Tensor) -> torch.Tensor:
    """Of every row, as a scale."""
    return x.abs().max(dim=-1, keepdim=True).values.clip(min=1e-10) / 448


def rounded(x: torch.Tensor) -> torch.Tensor:
    return to_fp8(x, largest(x)).float() * largest(x)


def rounded_in_parts(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([rounded(part) for part in x.split(size, dim=-1)], dim=-1)


# fp8 in blocks


def in_blocks(name: str, weight: torch.Tensor, size: int = 128) -> Tensors:
    scales = torch.stack(
        [
            torch.stack([block.abs().max() / 448 for block in row.split(size, dim=1)])
            for row in weight.split(size, dim=0)
        ]
    )
    return {"weight": to_fp8(weight, _spread(scales, weight, size)), "weight_scale_inv": scales}


def _spread(scales: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
    return torch.kron(scales, torch.ones(size, size))[: weight.shape[0], : weight.shape[1]]


def from_blocks(held: Tensors, size: int = 128) -> Any:
    weight = held["weight"].float() * _spread(held["weight_scale_inv"], held["weight"], size)
    return weight, lambda x: rounded_in_parts(x, size)


# fp8 with one scale


def by_tensor(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    return {"weight": to_fp8(weight, scale), "weight_scale": scale}


def from_tensor(held: Tensors) -> Any:
    return held["weight"].float() * held["weight_scale"], rounded


def given(name: str, weight: torch.Tensor) -> Tensors:
    """With the scale of its inputs."""
    scale = torch.tensor([0.02 if "q_proj" in name else 0.03])
    return by_tensor(name, weight) | {"input_scale": scale}


def from_given(held: Tensors) -> Any:
    scale = held["input_scale"]
    return from_tensor(held)[0], lambda x: to_fp8(x, scale).float() * scale


WIDE = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
SKIPPED = {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp", "layers.1.self_attn.k_proj"]}
ROWS: dict[str, tuple[dict[str, Any], Any, Dequantise, tuple[str, ...], dict[str, Any]]] = {
    "fp8 in blocks": (FP8 | {"weight_block_size": [128, 128]}, in_blocks, from_blocks, (), WIDE),
    "fp8 by tensors, some modules in 16 bit": (
        FP8 | SKIPPED,
        by_tensor,
        from_tensor,
        ("layers.0.mlp.", "layers.1.self_attn.k_proj."),
        {"family": "qwen2"},
    ),
    "fp8 by tensors, static": (FP8 | {"activation_scheme": "static"}, given, from_given, (), {}),
}


@pytest.mark.parametrize("impl", ["native", "transformers"])
@pytest.mark.parametrize("row", ROWS)
def test_answers_are_those_of_peft_over_the_same_base(tmp_path: Path, row: str, impl: str) -> None:
    config, quantise, dequantise, skipped, model = ROWS[row]
    write_quantised(tmp_path / "base", config, quantise, skipped, **model)
    tensors = load_file(tmp_path / "base" / "model.safetensors")

    def weights(path: str) -> Any:
        return dequantise({n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")})

    def base() -> Any:
        return plain_twin(tmp_path / "base", weights)

    models = {name: with_adapter(tmp_path / name, base, i, **c) for i, (name, c) in enumerate(ADAPTERS.items())}
    held_against_peft(tmp_path, {None: base(), **models}, model_impl=impl)


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_fp8_while_it_is_loaded(tmp_path: Path, impl: str) -> None:
    make_tiny_model(tmp_path / "base", "qwen3")

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        for module in decoder_linears(model).values():
            module.weight.data = rounded(module.weight.data)
            round_at(module, rounded)
        return model

    models = {name: with_adapter(tmp_path / name, base, i, **c) for i, (name, c) in enumerate(ADAPTERS.items())}
    held_against_peft(tmp_path, {None: base(), **models}, model_impl=impl, quantization="fp8")


def held_against_peft(path: Path, models: dict[str | None, Any], close: float = 2e-2, **options: Any) -> None:
    """One batch of all: tokens are equal where the choice is clear, logprobs near (a number that falls on the other
    side of a rounding to 8 bits moves them)."""
    driver = EngineDriver(path / "base", {name: path / name for name in models if name}, page_size=4, **options)
    try:
        expected, rids = {}, {}
        for name, model in models.items():
            prompt, answer = clear_prompt(model)
            expected[name] = answer
            rids[name] = ask_for_all(driver, prompt, name, vocab=VOCAB, max_new_tokens=NEW_TOKENS)
        driver.run()
        for name, (tokens, logprobs) in expected.items():
            answer = driver.answers[rids[name]]
            assert answer.tokens == tokens, name
            found = told(answer, VOCAB)
            assert (found - logprobs[: len(found)]).abs().max() < close, name
    finally:
        driver.close()


def clear_prompt(model: Any) -> tuple[list[int], tuple[list[int], torch.Tensor]]:
    for seed in range(40):
        prompt = torch.randint(3, VOCAB, (11,), generator=torch.Generator().manual_seed(seed)).tolist()
        if (answer := clear_answer(model, prompt, NEW_TOKENS)) is not None:
            return prompt, answer
    raise AssertionError("no clear answer in 40 prompts")
