"""Ranks that share the model answer as one does: everything that an engine has, at once, for every family.

`test_parity.py` and `test_peft_parity.py` hold one rank against transformers and PEFT here, and two and four ranks in
the slow tier; this file is what of that fits into seconds. All in fp32; logprobs agree to 1e-4.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xgrammar
from exactness import ask_for_all, told
from fakes.engine_driver import Answer, EngineDriver
from fakes.models import FAMILIES, make_adapter, make_tiny_model
from peft_rows import MODELS, ROWS, Lab, Row

from multilora.engine.messages import UseTokenizer

CLOSE = 1e-4  # largest difference of a logprob
VOCAB = 101
INFO = xgrammar.TokenizerInfo([bytes([i]) for i in range(99)], vocab_size=VOCAB, stop_token_ids=[2])
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 1, "lora_alpha": 3, "target_modules": ["o_proj", "down_proj"]},
    "seven": {"r": 16, "lora_alpha": 16, "target_modules": SEVEN},
    "large": {"r": 64, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
    "kv": {"r": 5, "lora_alpha": 10, "target_modules": ["k_proj", "v_proj", "gate_proj"]},
}
KINDS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 3},
    {"logit_bias": {"7": 3.0}, "min_new_tokens": 4},
    {"temperature": 1.5, "top_k": 20, "sampling_seed": 4, "presence_penalty": 0.5},
    {"grammar": xgrammar.Grammar.from_regex("[0-9A-Z]{3,9}").serialize_json()},
]
STEM = [5, 96, 31, 7, 64, 12, 80, 3, 55, 41, 23, 9, 71]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def answers(path: Path, ranks: int, ahead: int) -> list[Answer]:
    """The answers of two rounds of mixed requests over few pages, two adapters at a time, a swap between them."""
    adapters = {name: path / name for name in ADAPTERS}
    options: dict[str, Any] = {"tp_size": ranks, "page_size": 4}
    roomy = EngineDriver(path / "model", adapters, **options)
    pages = max(info.pages for info in roomy.infos.values())
    roomy.close()
    driver = EngineDriver(
        path / "model",
        adapters,
        ahead=ahead,
        chunked_prefill_size=9,
        max_loras_per_batch=2,
        max_total_tokens=4 * (pages + 14),
        **options,
    )
    driver.engine.handle(UseTokenizer(INFO.serialize_json()))
    names = [None, *ADAPTERS]
    for turn in range(2):
        for i in range(20):
            prompt = [*STEM[: 5 + i % 9], 11 + i]
            driver.submit(
                prompt,
                names[i % 5] if i % 7 else {"seven": 0.5, "kv": -1.0},
                max_new_tokens=10,
                ignore_eos=i % 3 == 0,
                return_logprob=i % 2 == 0,
                logprob_start_len=i % 4,
                top_logprobs_num=3,
                **KINDS[(i + turn) % len(KINDS)],
            )
            driver.step(i % 3)
        driver.run()
        if turn == 0:
            driver.unload("kv")
            driver.load("kv", path / "one")  # the name stands for another adapter now
    stats = driver.stats
    # where every layer has a window, a text that may start has all the pages that it will hold
    assert stats.preemptions or driver.engine.scheduler.kv.prefix.groups[0].window is not None, stats
    assert stats.cached_tokens and sum(a.evictions for a in stats.adapters) > 2, stats
    driver.close()
    return list(driver.answers.values())


def check_equal(found: list[Answer], expected: list[Answer]) -> None:
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.finished == theirs.finished and mine.finished is not None and mine.finished.type != "error"
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=CLOSE)
        assert [[i for _, i in top] for top in mine.top_logprobs] == [[i for _, i in t] for t in theirs.top_logprobs]
        inputs = [[x for x in answer.input_logprobs or [] if x is not None] for answer in (mine, theirs)]
        assert inputs[0] == pytest.approx(inputs[1], abs=CLOSE)


QUICK = ("qwen2",)
"""Families: with biases that are divided. Qwen3 has norms that are not, the others differ in positions only."""
TWO = [pytest.param(family, 2, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES]
FOUR = pytest.param("qwen2", 4, marks=pytest.mark.slow)  # more ranks than KV heads


@pytest.mark.parametrize(("family", "ranks"), [*TWO, FOUR])
def test_everything_at_once(family: str, ranks: int, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", family, seed=11)
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        make_adapter(tmp_path / name, tmp_path / "model", seed=seed, **config)
    ahead = int(family == "llama")
    check_equal(answers(tmp_path, ranks, ahead), answers(tmp_path, 1, ahead))


FEATURES = (
    "DoRA, rsLoRA, `rank_pattern`",
    'DoRA and `bias` "all"',
    "DoRA on `lm_head`",
    "`modules_to_save`: a linear layer with its bias",
    "LoRA on `embed_tokens` and `lm_head`, tied, `ensure_weight_tying`",
    "`trainable_token_indices` and LoRA on `lm_head`, tied",
    "added tokens, `trainable_token_indices`",
    "fewer tokens",
    "activated LoRA (`alora_invocation_tokens`)",
)


def chosen() -> list[Row]:
    """Whatever acts outside the plain low-rank pass."""
    return [row for row in ROWS if row.refused is None and row.feature in FEATURES]


SLOW = (
    "DoRA, rsLoRA, `rank_pattern`",
    "DoRA on `lm_head`",
    "`trainable_token_indices` and LoRA on `lm_head`, tied",
    "fewer tokens",
)
"""Each acts where one of the others does."""


def judged(lab: Lab, row: Row, ranks: int) -> tuple[list[int], torch.Tensor]:
    driver = EngineDriver(lab.model(row.model), {"row": lab.adapter(row)}, page_size=4, tp_size=ranks)
    rid = ask_for_all(driver, row.prompts(1)[0], "row", vocab=VOCAB + row.added, max_new_tokens=6)
    driver.submit(row.prompts(2)[1], None)
    driver.run()
    driver.close()
    return driver.answers[rid].tokens, told(driver.answers[rid], VOCAB + row.added)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.feature, marks=pytest.mark.slow if row.feature in SLOW else ()) for row in chosen()],
)
def test_what_peft_saves(row: Row, lab: Lab) -> None:
    """Against PEFT itself in the slow tier (`test_peft_parity.py`)."""
    (tokens, logprobs), (expected, theirs) = judged(lab, row, 2), judged(lab, row, 1)
    assert tokens == expected
    assert (logprobs - theirs).abs().max() < CLOSE


def test_the_chosen_features_exist() -> None:
    assert set(SLOW) < set(FEATURES)
    assert len(chosen()) == len(FEATURES) and set(MODELS) >= {row.model for row in chosen()}
