"""`verify`: adapters saved by PEFT pass; one whose files say something else than PEFT loads does not.

Covers `reference.py`, `render.py` too.
"""

import importlib.util
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from fakes.tokenizers import byte_level_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from multilora.adapter_tools import verify as module
from multilora.adapter_tools.verify import _compare, _Prompt, verify
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine
from multilora.errors import AdapterIncompatible, ConfigError
from multilora.front.stream import FinishReason
from multilora.llm.completion import Completion
from multilora.llm.offline import LLM

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear", "r": 8},
    "patterns": {"target_modules": ["q_proj", "up_proj"], "r": 4, "rank_pattern": {"up_proj": 9}, "use_rslora": True},
    "dora": {"target_modules": ["k_proj", "o_proj"], "use_dora": True},
    "head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 70]},
    "activated": {"target_modules": ["q_proj", "k_proj", "v_proj"], "alora_invocation_tokens": [7, 8, 9]},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and one without."""
    path = tmp_path_factory.mktemp("files")
    tokenizer = byte_level_tokenizer()
    make_tiny_model(path / "model", vocab_size=tokenizer.vocab_size)
    tokenizer.hf.save_pretrained(path / "model")
    make_tiny_model(path / "bare")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        make_adapter(path / name, path / "model", seed=seed, task_type="CAUSAL_LM", **config)
    make_tiny_model(path / "other", hidden_size=32)
    make_adapter(path / "for-bare", path / "bare", r=4, target_modules=["q_proj"])
    return path


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loader process, which is quicker."""
    monkeypatch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_saved_by_peft_pass(files, name):
    verdict = verify(str(files / name), str(files / "model"), device="cpu")
    assert verdict.ok and verdict.base_ok
    assert 0 < verdict.difference <= verdict.tolerance == 1e-4
    prompts = [check.prompt for check in verdict.checks if check.adapter]
    assert prompts == [check.prompt for check in verdict.checks if not check.adapter]
    assert len(prompts) == 6 + (name in ("tokens", "activated"))
    assert all(check.tokens == check.equal == 16 for check in verdict.checks)


def test_prompts_of_ones_own_and_no_tokenizer(files):
    verdict = verify(str(files / "plain"), str(files / "model"), prompts=["one", "two " * 100], device="cpu")
    assert [c.prompt for c in verdict.checks if c.adapter][4:] == ["'one'", "'" + ("two " * 100)[:39] + "…'"]
    assert verdict.ok
    verdict = verify(str(files / "for-bare"), str(files / "bare"), device="cpu")
    assert verdict.ok and len(verdict.checks) == 8
    with pytest.raises(ConfigError, match="tokenizer"):
        verify(str(files / "for-bare"), str(files / "bare"), prompts=["text"], device="cpu")


@pytest.mark.filterwarnings("ignore")  # of PEFT, about transformers and about saving
def test_an_adapter_with_more_tokens_than_the_model(files, tmp_path):
    """PEFT needs a base model made larger first; `verify` does that."""
    base = AutoModelForCausalLM.from_pretrained(files / "bare", dtype=torch.float32)
    base.resize_token_embeddings(104, mean_resizing=False)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    )
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path)
    verdict = verify(str(tmp_path), str(files / "bare"), device="cpu")
    assert verdict.ok and verdict.base_ok and verdict.difference > 0


def test_a_difference_that_is_no_number_is_the_largest():
    check = _compare(_Prompt("x", [1]), True, answer(tokens=[2], logprob=math.nan), torch.zeros(2, 4), tolerance=1.0)
    assert check.difference == math.inf and not check.within(1.0)


def answer(tokens: list[int], logprob: float) -> Completion:
    tops = [[(logprob, token)] for token in tokens]
    return Completion("", tokens, FinishReason("length"), 1, 0, top_logprobs=tops, input_top_logprobs=[None])


def test_other_weights_fail(files, monkeypatch):
    """The engine gets one adapter, PEFT another."""
    real = LLM
    other = str(files / "patterns")
    monkeypatch.setattr(module, "LLM", lambda path, **o: real(path, **(o | {"lora_paths": {module.NAME: other}})))
    verdict = verify(str(files / "plain"), str(files / "model"), device="cpu")
    assert not verdict.ok and verdict.base_ok
    assert verdict.difference > 0.1
    assert any(check.equal < check.tokens for check in verdict.checks if check.adapter)


def test_a_tolerance_that_nothing_meets(files):
    assert not verify(str(files / "plain"), str(files / "model"), device="cpu", tolerance=1e-12).ok


def test_half_precision(files):
    verdict = verify(str(files / "plain"), str(files / "model"), device="cpu", dtype="bfloat16", tolerance=2.0)
    assert 1e-3 < verdict.difference < 2.0


def test_what_cannot_be_compared(files, monkeypatch):
    with pytest.raises(AdapterIncompatible):
        verify(str(files / "plain"), str(files / "other"), device="cpu")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    with pytest.raises(ConfigError, match="pip install peft"):
        verify(str(files / "plain"), str(files / "model"), device="cpu")
