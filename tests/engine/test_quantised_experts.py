"""Mixtures whose experts are in FP8, under adapters in 16 bit: the answers are those of transformers and PEFT.

Their experts there compute the definition, written a second time; adapters act on attention, the router and experts,
and share a batch with the base model, on one rank and where two divide the experts.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import ask_for_all, told
from expert_layouts import QWEN, as_stacks, by_expert, rewrite
from fakes.engine_driver import EngineDriver
from fakes.models import make_tiny_model
from fakes.tokenizers import byte_level_tokenizer
from fp8_definitions import FLOATS, FP8, TOKENS, by_row, compressed, from_blocks, from_tensor, in_blocks, rounded
from quantised import (
    EXPERT_ADAPTERS,
    NEW_TOKENS,
    VOCAB,
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

from multilora import LLM
from multilora.engine.messages import MemoryTag, Sleep, WakeUp
from multilora.layers.weights.base import ExpertsWeight

PROMPT = list(range(5, 24))
TAGS: list[MemoryTag] = ["weights", "kv_cache"]
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
    models = {name: with_adapter(path / name, base, i, **c) for i, (name, c) in enumerate(EXPERT_ADAPTERS.items())}
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


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow if "qwen2" in row else ()) for row in CHECKPOINTS]
)
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


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_experts_are_quantised_while_they_are_loaded(tmp_path: Path, family: str) -> None:
    """Routers stay what they are. Ranks would round their parts of other modules' inputs, each for itself."""
    make_tiny_model(tmp_path / "base", family)
    compare(tmp_path, lambda: rounding(tmp_path / "base", all_linears=True), (1,), quantization="fp8")


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
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


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A mixture in 32 bit and an adapter on its experts."""
    make_tiny_model(tmp_path / "base", "qwen3_moe")
    base = partial(AutoModelForCausalLM.from_pretrained, tmp_path / "base", dtype=torch.float32)
    with_adapter(tmp_path / "wrappers", base, 0, **EXPERT_ADAPTERS["experts"])
    return tmp_path


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_layout_of_an_adapter_says_the_same_over_them(mixture: Path, ranks: int) -> None:
    layouts: dict[str, tuple[Any, list[str]]] = {
        "by expert": (partial(by_expert, names=QWEN), ["o_proj", "gate_proj", "up_proj", "down_proj"]),
        "stacks": (as_stacks, ["o_proj", "gate_up_proj", "down_proj"]),
    }
    for name, (change, modules) in layouts.items():
        shutil.copytree(mixture / "wrappers", mixture / name)
        rewrite(mixture / name, change, target_parameters=None, target_modules=modules)
    names = ("wrappers", *layouts)
    options = {"page_size": 4, "quantization": "fp8", "tp_size": ranks}
    driver = EngineDriver(mixture / "base", {name: mixture / name for name in names}, **options)
    try:
        said = {}
        for name in (None, *names):
            rid = ask_for_all(driver, PROMPT, name, vocab=VOCAB, max_new_tokens=NEW_TOKENS)
            driver.run()
            said[name] = told(driver.answers[rid], VOCAB)
        for name in layouts:
            errors = (said[name] - said["wrappers"]).abs().amax(-1)
            assert errors.max() < CLOSE and errors.median() < TYPICAL, name
        assert not torch.allclose(said["wrappers"], said[None], atol=0.1)
    finally:
        driver.close()


def test_they_wake_up_as_they_were(mixture: Path) -> None:
    """Discarded and read again."""
    driver = EngineDriver(mixture / "base", {"a": mixture / "wrappers"}, quantization="fp8")
    try:
        before = driver.complete(PROMPT, "a", max_new_tokens=NEW_TOKENS).tokens
        held = [module for module in driver.engine.runner._model.modules() if isinstance(module, ExpertsWeight)]
        driver.call(Sleep(call=0, level=2, mode="keep", tags=TAGS))
        assert [weight.data.untyped_storage().nbytes() for weight in held] == [0] * 4
        driver.call(WakeUp(0, TAGS))
        assert driver.complete(PROMPT, "a", max_new_tokens=NEW_TOKENS).tokens == before
    finally:
        driver.close()


@pytest.mark.slow
def test_offline(mixture: Path) -> None:
    """`LLM` and the engine alone say the same."""
    driver = EngineDriver(mixture / "base", {"a": mixture / "wrappers"}, quantization="fp8")
    expected = driver.complete(PROMPT, "a", max_new_tokens=NEW_TOKENS).tokens
    driver.close()
    byte_level_tokenizer().hf.save_pretrained(mixture / "base")
    options = {"device": "cpu", "max_total_tokens": 1024, "quantization": "fp8"}
    with LLM(str(mixture / "base"), lora_paths={"a": str(mixture / "wrappers")}, **options) as llm:
        greedy = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS}
        assert llm.generate(PROMPT, greedy, lora_path="a").token_ids == expected
