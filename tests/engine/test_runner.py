"""Which steps the runner replays, and that embedding and head around a graph are those of the step's adapters."""

from typing import Any

import pytest
import torch
from peft_rows import ROWS, Lab, Row

from multilora.batch import ForwardBatch
from multilora.engine.driver import EngineDriver
from multilora.engine.runner import Reach, Runner

REPLAYED = (
    Row("plain", {"target_modules": ["q_proj", "up_proj"]}),
    *(row for row in ROWS if row.feature.startswith(("LoRA on `", "`trainable_token_indices`", "added tokens"))),
    Row("own head and embedding", {"modules_to_save": ["lm_head", "embed_tokens"]}),
)
EAGER = (
    Row("own norms", {"modules_to_save": ["norm"]}, "Qwen3"),
    Row("own MLP", {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
)
SERVED = [row for row in REPLAYED if row.refused is None]


class FakeGraphs:
    """Stands where `DecodeGraphs` stands: the layers alone, with the low-rank pass and nothing else."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self.replays = 0

    def run(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        self.replays += 1
        return self._runner._layers(x, batch, Reach.LAYERS)


def answers(driver: EngineDriver, prompts: list[list[int]]) -> list[Any]:
    """Of the adapter, a plain one and the base model, in one batch."""
    rids = [
        driver.submit(prompt, name, max_new_tokens=6, ignore_eos=True, return_logprob=True)
        for prompt in prompts
        for name in ("row", "plain", None)
    ]
    driver.run()
    return [driver.answers[rid] for rid in rids]


def compare(lab: Lab, row: Row) -> int:
    """The same answers with and without graphs; returns how many steps were replayed."""
    paths = {"row": lab.adapter(row), "plain": lab.adapter(Row(f"plain {row.model}", {"r": 4}, row.model))}
    found = []
    for fake in (False, True):
        driver = EngineDriver(lab.model(row.model), paths, disable_radix_cache=True)
        runner = driver.engine.runner
        graphs = FakeGraphs(runner)
        if fake:
            runner._graphs = graphs  # type: ignore[assignment]
        found.append(answers(driver, row.prompts(2)))
        driver.close()
    for eager, replayed in zip(*found, strict=True):
        assert eager.tokens == replayed.tokens
        assert eager.logprobs == pytest.approx(replayed.logprobs, abs=1e-5)
    return graphs.replays


@pytest.mark.parametrize("row", SERVED, ids=[row.feature for row in SERVED])
def test_what_acts_on_embedding_and_head_needs_no_eager_step(row: Row, lab: Lab) -> None:
    assert compare(lab, row) == 5  # all decodes of six tokens


@pytest.mark.parametrize("row", EAGER, ids=[row.feature for row in EAGER])
def test_what_replaces_modules_between_them_does(row: Row, lab: Lab) -> None:
    assert compare(lab, row) == 0


def test_prompts_are_not_replayed(lab: Lab) -> None:
    driver = EngineDriver(lab.model("Llama"), {}, disable_radix_cache=True)
    graphs = FakeGraphs(driver.engine.runner)
    driver.engine.runner._graphs = graphs  # type: ignore[assignment]
    driver.complete([5, 6, 7], None, max_new_tokens=1)
    assert graphs.replays == 0
    driver.complete([5, 6, 7], None, max_new_tokens=3, ignore_eos=True)
    assert graphs.replays == 2
    driver.close()
