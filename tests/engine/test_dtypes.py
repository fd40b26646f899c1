"""Weights, KV cache and adapters each in a dtype of their own, on the backends that can do it; the others refuse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clear_answers import clear_answer
from exactness import ask_for_all, told
from fakes.engine_driver import EngineDriver
from fakes.models import make_adapter, make_tiny_model

from multilora.errors import ConfigError
from multilora.models.config import ModelConfig

VOCAB = 101
ADAPTERS: dict[str, dict[str, Any]] = {  # alpha over r is a power of two, so that scaling B costs no bit of it
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora": {"target_modules": ["k_proj", "up_proj"], "use_dora": True},
    "ends": {"target_modules": ["o_proj", "embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["gate_proj", "input_layernorm", "lm_head"]},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A base model in fp32, and PEFT's models with adapters whose numbers are those of float16."""
    path = tmp_path_factory.mktemp("dtypes")
    make_tiny_model(path / "base", "llama")
    models = {
        name: make_adapter(path / name, path / "base", seed=i, dtype="float16", r=4, lora_alpha=8, **config)
        for i, (name, config) in enumerate(ADAPTERS.items())
    }
    return path, models


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on models have the dtypes given here besides that of their weights."""

    def use(**others: torch.dtype) -> None:
        plain = ModelConfig.with_dtype
        monkeypatch.setattr(ModelConfig, "with_dtype", lambda self, dtype: replace(plain(self, dtype), **others))

    return use


def answers(path: Path, expected: dict[str, tuple[list[int], list[int]]], **options: Any) -> dict[str, torch.Tensor]:
    """Logprobs [tokens, vocab] of all positions, every adapter in one batch. The tokens are the expected ones."""
    driver = EngineDriver(path / "base", {name: path / name for name in ADAPTERS}, page_size=4, **options)
    rids = {n: ask_for_all(driver, prompt, n, vocab=VOCAB, max_new_tokens=6) for n, (prompt, _) in expected.items()}
    driver.run()
    assert {n: driver.answers[rid].tokens for n, rid in rids.items()} == {n: t for n, (_, t) in expected.items()}
    return {name: told(driver.answers[rid], VOCAB) for name, rid in rids.items()}


def peft(models: dict[str, Any]) -> tuple[dict[str, tuple[list[int], list[int]]], dict[str, torch.Tensor]]:
    """Prompts with their greedy tokens, and logprobs of all positions."""
    found, logprobs = {}, {}
    for name, model in models.items():
        for seed in range(20):
            prompt = torch.randint(3, VOCAB, (13,), generator=torch.Generator().manual_seed(seed)).tolist()
            if (answer := clear_answer(model, prompt, 6)) is not None:
                found[name], logprobs[name] = (prompt, answer[0]), answer[1]
                break
    assert found.keys() == ADAPTERS.keys()
    return found, logprobs


def worst(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - exact[name][: len(found[name])]).abs().max()) for name in exact)


def test_adapters_in_half_the_bytes_of_the_weights(
    lab: tuple[Path, dict[str, Any]], dtypes: Callable[..., None]
) -> None:
    """They lose nothing, since their numbers are float16's."""
    path, models = lab
    expected, exact = peft(models)
    dtypes(adapter_dtype=torch.float16)
    assert worst(answers(path, expected), exact) < 1e-4


def test_adapters_in_more_bytes_than_the_weights(
    lab: tuple[Path, dict[str, Any]], dtypes: Callable[..., None]
) -> None:
    path, models = lab
    expected, exact = peft(models)
    dtypes(dtype=torch.bfloat16, kv_dtype=torch.bfloat16, adapter_dtype=torch.float32)
    driver = EngineDriver(path / "base", {name: path / name for name in ADAPTERS}, page_size=4)
    for name, (prompt, _) in expected.items():
        rid = ask_for_all(driver, prompt, name, vocab=VOCAB, max_new_tokens=1)
        driver.run()
        found = told(driver.answers[rid], VOCAB)
        assert float((found - exact[name][: len(found)]).abs().mean()) < 0.1


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.bfloat16])
def test_a_kv_cache_of_another_dtype(
    kv_dtype: torch.dtype, lab: tuple[Path, dict[str, Any]], dtypes: Callable[..., None]
) -> None:
    """It is rounded, a little, and nearly the same whichever way prompts are cut into chunks: a product of other rows
    is summed in another order, and then a number may fall on the other side of a rounding."""
    path, models = lab
    expected, exact = peft(models)
    dtypes(kv_dtype=kv_dtype, adapter_dtype=torch.float16)
    found = answers(path, expected)
    assert 1e-5 < worst(found, exact) < 0.2
    for size in (3, 5):
        assert worst(answers(path, expected, chunked_prefill_size=size), found) < 1e-3


def test_pages_hold_more_tokens_of_a_smaller_kv_cache(
    lab: tuple[Path, dict[str, Any]], dtypes: Callable[..., None]
) -> None:
    path, _ = lab
    plain = EngineDriver(path / "base", arena_bytes=1 << 20).stats.total_pages
    dtypes(kv_dtype=torch.float16)
    assert EngineDriver(path / "base", arena_bytes=1 << 20).stats.total_pages == 2 * plain


def test_the_triton_backends_refuse_adapters_of_another_dtype_by_name(
    lab: tuple[Path, dict[str, Any]], dtypes: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = lab
    dtypes(adapter_dtype=torch.float16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said = r"--lora-backend csgmv takes adapters in the model's dtype, torch\.float32; they are torch\.float16"
    with pytest.raises(ConfigError, match=said):
        EngineDriver(path / "base", lora_backend="csgmv")
