"""Which steps the runner replays, and that embedding and head around a graph are those of the step's adapters."""

from typing import Any

import pytest
import torch
from fakes.engine_driver import EngineDriver
from peft_rows import ROWS, Lab, Row

from multilora.batch import ForwardBatch
from multilora.engine.execution.runner import AdapterScope, Graphs, Runner

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
    """Stands where `DecodeCudaGraphs` or `PiecewiseCudaGraphs` stands: the layers alone, with the low-rank pass and
    nothing else. most: larger steps are not replayed."""

    def __init__(self, runner: Runner, most: int = 1000):
        self._runner = runner
        self._most = most
        self.replays = 0

    def run(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor | None:
        if len(x) > self._most:
            return None
        self.replays += 1
        return self._runner._layers(x, batch, AdapterScope.LAYERS)


def use(runner: Runner, **graphs: FakeGraphs) -> None:
    runner._graphs = Graphs(**graphs)  # type: ignore[arg-type]


def answers(driver: EngineDriver, row: Row, plain: Row) -> list[Any]:
    """Of the adapter, a plain one and the base model, in one batch."""
    jobs = [("row", prompt) for prompt in row.prompts(2)]
    jobs += [(name, prompt) for prompt in plain.prompts(2) for name in ("plain", None)]
    rids = [
        driver.submit(prompt, name, max_new_tokens=6, ignore_eos=True, return_logprob=True) for name, prompt in jobs
    ]
    driver.run()
    return [driver.answers[rid] for rid in rids]


def compare(lab: Lab, row: Row, kind: str) -> int:
    """The same answers with and without graphs; returns how many steps were replayed."""
    plain = Row(f"plain {row.model}", {"r": 4}, row.model)
    paths = {"row": lab.adapter(row), "plain": lab.adapter(plain)}
    found = []
    for fake in (False, True):
        driver = EngineDriver(lab.model(row.model), paths, disable_radix_cache=True)
        graphs = FakeGraphs(driver.engine.runner)
        if fake:
            use(driver.engine.runner, **{kind: graphs})
        found.append(answers(driver, row, plain))
        driver.close()
    for eager, replayed in zip(*found, strict=True):
        assert eager.tokens == replayed.tokens
        assert eager.logprobs == pytest.approx(replayed.logprobs, abs=1e-5)
    return graphs.replays


@pytest.mark.parametrize("row", SERVED, ids=[row.feature for row in SERVED])
def test_what_acts_on_embedding_and_head_needs_no_eager_step(row: Row, lab: Lab) -> None:
    assert compare(lab, row, "decodes") == 5  # all decodes of six tokens
    assert compare(lab, row, "pieces") == 6  # the prompts, too


@pytest.mark.parametrize("row", EAGER, ids=[row.feature for row in EAGER])
def test_what_replaces_modules_between_them_does(row: Row, lab: Lab) -> None:
    assert compare(lab, row, "decodes") == compare(lab, row, "pieces") == 0


def test_which_graphs_a_step_takes(lab: Lab) -> None:
    driver = EngineDriver(lab.model("Llama"), {}, disable_radix_cache=True)
    runner = driver.engine.runner
    decodes, pieces = FakeGraphs(runner), FakeGraphs(runner, most=4)
    use(runner, decodes=decodes, pieces=pieces)
    driver.complete([5, 6, 7, 8, 9], None, max_new_tokens=3, ignore_eos=True)
    assert (decodes.replays, pieces.replays) == (2, 0), "five rows are too many for pieces"
    driver.complete([5, 6, 7], None, max_new_tokens=3, ignore_eos=True)
    assert (decodes.replays, pieces.replays) == (4, 1)
    few = FakeGraphs(runner, most=0)
    use(runner, decodes=few, pieces=pieces)
    driver.complete([5, 6, 7], None, max_new_tokens=3, ignore_eos=True)
    assert (few.replays, pieces.replays) == (0, 2), "decodes that no graph takes are launched one by one"
    driver.close()
