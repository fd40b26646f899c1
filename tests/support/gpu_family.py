"""Small models with adapters, and their engines on a GPU, for the tests that need one.

MULTILORA_TEST_DEVICE=cpu tries most of them out without a GPU. In bf16 logprobs are judged against transformers and
PEFT (`exactness.py`); two engines in fp32 are held against each other, token for token.
"""

import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exactness import Judged, judge
from fakes.engine_driver import Answer, EngineDriver
from fakes.models import make_adapter, make_tiny_model

DEVICE, DTYPE = os.environ.get("MULTILORA_TEST_DEVICE", "cuda"), "bfloat16"

SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 128, "num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 128, "num_key_value_heads": 2},
    "mistral": {"head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2},  # with a window
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "qv": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "seven": {"r": 16, "lora_alpha": 4, "target_modules": "all-linear"},
    "rslora": {"r": 64, "lora_alpha": 1, "target_modules": "all-linear", "use_rslora": True},
    "gate": {"r": 3, "lora_alpha": 3, "target_modules": ["gate_proj"]},
}
NEW_TOKENS = 16
LENGTHS = (1, 5, 17, 64, 130)
CLOSE = 1e-3  # logprobs of two runs in fp32
EXACT = {"dtype": "float32"}


@dataclass(frozen=True)
class Family:
    path: Path
    prompts: list[list[int]]
    models: dict[str | None, Any]  # transformers and PEFT, fp32

    def driver(self, names: Any = ADAPTERS, **options: Any) -> EngineDriver:
        paths = {name: self.path / name for name in names}
        defaults = {"device": DEVICE, "dtype": DTYPE, "arena_bytes": 64 << 20, "max_running_requests": 8}
        return EngineDriver(self.path / "model", paths, **(defaults | options))

    def jobs(self) -> list[tuple[str | None, int]]:
        return [(name, prompt) for prompt in range(len(self.prompts)) for name in (None, *ADAPTERS)]


def make_family(path: Path, name: str, adapters: dict[str, dict[str, Any]]) -> Family:
    models: dict[str | None, Any] = {None: make_tiny_model(path / "model", name, seed=3, **(SIZES | FAMILIES[name]))}
    for seed, (adapter, config) in enumerate(adapters.items()):
        models[adapter] = make_adapter(path / adapter, path / "model", seed=seed, dtype=DTYPE, **config)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, SIZES["vocab_size"]) for _ in range(n)] for n in LENGTHS]
    prompts.append(prompts[-1][:100] + prompts[0])
    return Family(path, prompts, models)


def submit_all(driver: EngineDriver, family: Family, jobs: list[tuple[str | None, int]]) -> dict[str, tuple]:
    return {
        driver.submit(
            family.prompts[prompt], name, max_new_tokens=NEW_TOKENS, ignore_eos=True, return_logprob=True
        ): (name, prompt)
        for name, prompt in jobs
    }


def run(driver: EngineDriver, family: Family, jobs: list[tuple[str | None, int]]) -> dict[tuple, Answer]:
    rids = submit_all(driver, family, jobs)
    driver.run()
    return {job: driver.answers[rid] for rid, job in rids.items()}


def judged(family: Family, answers: Iterable[tuple[tuple, Answer]]) -> Judged:
    """answers: with the (adapter or None, prompt) that they answer."""
    found: dict[str | None, list[tuple[list[int], torch.Tensor]]] = {}
    for (name, prompt), answer in answers:
        whole = family.prompts[prompt] + answer.tokens
        found.setdefault(name, []).append((whole, torch.tensor(answer.logprobs)))
    return judge(family.models, found, DEVICE, getattr(torch, DTYPE))


def equal(found: Answer, expected: Answer) -> bool:
    """Token for token; logprobs but for rounding."""
    pairs = zip(found.logprobs, expected.logprobs, strict=True)
    return found.tokens == expected.tokens and all(abs(a - b) < CLOSE for a, b in pairs)
