"""The parity table: whatever PEFT can save is served exactly as PEFT computes it, or refused by name.

Per row one small model and one adapter that PEFT saved; the engine's greedy tokens equal PEFT's and every logprob of
every position agrees to 1e-4, alone and in a batch that mixes the adapter with a plain one and with the base model.
All in fp32; in the slow tier rows that only the reader tells apart, and all of them on two ranks that share the
model. The table at the end of docs/adapters.md lists these rows; with PARITY_RESULTS set, the results are written
there for `scripts/parity_table.py`.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from clear_answers import clear_answer
from exactness import ask_for_all, told
from fakes.engine_driver import DEVICE, Answer, EngineDriver
from peft_rows import INVOCATION, MODELS, ROWS, Lab, Row
from transformers import AutoModelForCausalLM

from multilora.errors import AdapterError

NEW_TOKENS = 8
CLOSE = 1e-4  # largest difference of a logprob
PLAIN = Row("plain", {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj", "o_proj"]})

READ_ALIKE = frozenset(
    {
        "rsLoRA (`use_rslora`)",
        "`target_modules` as a list of suffixes and full names",
        "`target_modules` as a regular expression",
        "`exclude_modules`",
        "`layers_to_transform`, `layers_pattern`",
        "`fan_in_fan_out`",
        "a file in float16",
        "several files with an index",
        "tensor names without `base_model.model.`",
        '`bias` "lora_only"',
        '`lora_bias` and `bias` "all"',
        "`modules_to_save`: `embed_tokens`, tied, `ensure_weight_tying`",
        "LoRA on `embed_tokens`, tied",
        "LoRA on `lm_head`",
        "LoRA on `lm_head` with `lora_bias`",
        "`trainable_token_indices` by module",
        "`save_embedding_layers`, tables as in the base model",
        "`save_embedding_layers` under LoRA on `lm_head`, tables as in the base model",
        "`save_embedding_layers` under LoRA on both tables, other tables",
        "`save_embedding_layers` with `trainable_token_indices`, another table, tied",
        "`save_embedding_layers` with `modules_to_save`, other tables",
        "added tokens, tied",
        "added tokens, `modules_to_save`: `embed_tokens`, tied",
        "added tokens, `trainable_token_indices`",
        "fewer tokens, tied",
        "PiSSA by `pissa_niter_4`, converted when saved",
        "OLoRA, converted when saved",
        "CorDA, converted when saved",
        "EVA",
        '`init_lora_weights` "gaussian"',
        '`init_lora_weights` "orthogonal"',
        "MiCA",
        "VeLoRA",
    }
)
"""Rows that come to the engine as others do: what the reader makes of them is held against PEFT in the quick tier, in
`adapters/peft/test_checkpoint_features.py`."""


@dataclass(frozen=True)
class Reference:
    """What PEFT says to a prompt. logprobs: [positions, vocab], of every token after the first."""

    prompt: list[int]
    tokens: list[int]
    logprobs: torch.Tensor


def reference(model: Any, prompt: list[int]) -> Reference | None:
    """None if a choice on the way is not clear: there rounding could decide."""
    answer = clear_answer(model, prompt, NEW_TOKENS)
    return Reference(prompt, *answer) if answer else None


def references(model: Any, row: Row, count: int = 2) -> list[Reference]:
    found = (answer for prompt in row.prompts(40) if (answer := reference(model, prompt)) is not None)
    return [next(found) for _ in range(count)]


@dataclass
class Bench:
    """One engine per model, with a plain adapter, and what base and plain adapter answer."""

    driver: EngineDriver
    base: list[Reference]
    plain: list[Reference]


class Benches:
    """ranks: so many share every model."""

    def __init__(self, lab: Lab, ranks: int):
        self._lab = lab
        self.ranks = ranks
        self._made: dict[str, Bench] = {}

    def get(self, model: str) -> Bench:
        if model not in self._made:
            row = Row(f"plain {model}", PLAIN.config, model)
            path = self._lab.model(model)
            base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            self._made[model] = Bench(
                EngineDriver(path, {"plain": self._lab.adapter(row)}, page_size=4, tp_size=self.ranks),
                references(base, row),
                references(self._lab.reference(row), row),
            )
        return self._made[model]

    def close(self) -> None:
        for bench in self._made.values():
            bench.driver.close()


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["alone", "on two ranks"])
def benches(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Benches]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    benches = Benches(lab, request.param)
    yield benches
    benches.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, dict[str, Any]]]:
    """Feature → what came out, for the table."""
    found: dict[str, dict[str, Any]] = {}
    yield found
    if path := os.environ.get("PARITY_RESULTS"):
        Path(path).write_text(json.dumps(found))


def submit(driver: EngineDriver, expected: Reference, adapter: str | None) -> str:
    return ask_for_all(driver, expected.prompt, adapter, vocab=expected.logprobs.shape[1], max_new_tokens=NEW_TOKENS)


def difference(answer: Answer, expected: Reference) -> float:
    """The largest of all logprobs of all positions. The tokens are equal."""
    assert answer.tokens == expected.tokens
    found = told(answer, expected.logprobs.shape[1])
    return float((found - expected.logprobs[: len(found)]).abs().max())


def sampled(row: Row) -> Any:
    slow = row.feature in READ_ALIKE and DEVICE == "cpu"
    return pytest.param(row, id=row.feature, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("row", [sampled(row) for row in ROWS])
def test_parity(row: Row, lab: Lab, benches: Benches, results: dict[str, dict[str, Any]]) -> None:
    bench = benches.get(row.model)
    if row.refused is not None:
        check_refused(row, bench.driver, lab)
        if benches.ranks == 1:
            results[row.feature] = {"model": row.model, "refused": row.refused}
        return
    expected = references(lab.reference(row), row)
    assert expected[0].tokens != bench.base[0].tokens, "the adapter does nothing"
    bench.driver.load("row", lab.adapter(row))
    worst = 0.0
    for answer in expected:  # alone
        rid = submit(bench.driver, answer, "row")
        bench.driver.run()
        worst = max(worst, difference(bench.driver.answers[rid], answer))
    jobs = [("row", answer) for answer in expected]
    jobs += [("plain", answer) for answer in bench.plain] + [(None, answer) for answer in bench.base]
    order = [jobs[i] for i in (4, 0, 2, 5, 1, 3)]
    rids = [submit(bench.driver, answer, name) for name, answer in order]
    bench.driver.run()
    for rid, (_, answer) in zip(rids, order, strict=True):
        worst = max(worst, difference(bench.driver.answers[rid], answer))
    bench.driver.unload("row")
    assert worst < CLOSE
    if benches.ranks == 1:
        results[row.feature] = {"model": row.model, "difference": worst}


def check_refused(row: Row, driver: EngineDriver, lab: Lab) -> None:
    """The engine says why, and goes on."""
    free = driver.stats.free_pages
    with pytest.raises(AdapterError) as caught:
        driver.load("row", lab.adapter(row))
    assert row.refused is not None and row.refused in caught.value.message
    assert driver.stats.free_pages == free


def test_every_model_is_used() -> None:
    assert {row.feature for row in ROWS if row.refused is None} > READ_ALIKE
    assert {row.model for row in ROWS} == set(MODELS)


def test_activated_prompts_hold_the_invocation() -> None:
    for row in ROWS:
        if "alora_invocation_tokens" in row.config and row.refused is None:
            assert tuple(INVOCATION) == row.prompt[-len(INVOCATION) :]


def test_the_documentation_lists_exactly_these_rows() -> None:
    """If not: python scripts/parity_table.py"""
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("parity_table", root / "scripts" / "parity_table.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = [line.strip("|").split(" | ") for line in script.written((root / "docs" / "adapters.md").read_text())]
    told = [(feature.strip(), model, result.strip()) for feature, model, result in found[2:]]
    assert [line[:2] for line in told] == [(row.feature, row.model) for row in ROWS]
    for (_, _, result), row in zip(told, ROWS, strict=True):
        assert result.startswith("the same, to " if row.refused is None else f"refused: {row.refused}")
