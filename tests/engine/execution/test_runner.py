"""Which steps the runner replays, that embedding and head around a graph are those of the step's adapters, and that
plans are all a runner needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.engine_driver import EngineDriver
from peft_rows import ROWS, Lab, Row

from multilora.batch import ForwardBatch
from multilora.engine.execution.runner import AdapterScope, Forward, Launched, Runner
from multilora.engine.plan import LoraInstall, StepPlan

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
IN_OTHER_WORDS = (
    "LoRA on `embed_tokens`, tied",
    "LoRA on `lm_head`, tied",
    "LoRA on `lm_head` with `lora_bias`",
    "`trainable_token_indices`",
    "`trainable_token_indices` by module",
    "added tokens, tied",
    "added tokens, `modules_to_save`: `embed_tokens`, tied",
    "added tokens, `trainable_token_indices`, tied",
)
"""Rows of `SERVED` that bring what others bring."""


class FakeGraphs:
    """Stands where `CudaGraphs` stands: the layers alone, with the low-rank pass and nothing else.

    replays: rows of each step that was replayed, decodes and others. pieces: whether others are.
    """

    def __init__(self, runner: Runner, *, pieces: bool = True):
        self._runner = runner
        self._pieces = pieces
        self.decodes: list[int] = []
        self.others: list[int] = []

    def prepare(self, batch: ForwardBatch, *, decodes: bool) -> "FakeStep | None":
        if not decodes and not self._pieces:
            return None
        (self.decodes if decodes else self.others).append(len(batch.positions))
        return FakeStep(self._runner, batch)


@dataclass
class FakeStep:
    runner: Runner
    batch: ForwardBatch

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self.runner._layers(x, self.batch, AdapterScope.LAYERS)


def answers(driver: EngineDriver, row: Row, plain: Row) -> list[Any]:
    """The tokens of the adapter, a plain one and the base model, in one batch."""
    jobs = [("row", prompt) for prompt in row.prompts(2)]
    jobs += [(name, prompt) for prompt in plain.prompts(2) for name in ("plain", None)]
    rids = [
        driver.submit(prompt, name, max_new_tokens=6, ignore_eos=True, return_logprob=True) for name, prompt in jobs
    ]
    driver.run()
    return [driver.answers[rid] for rid in rids]


def compare(lab: Lab, row: Row) -> FakeGraphs:
    """The same answers with and without graphs; returns what was replayed."""
    plain = Row(f"plain {row.model}", {"r": 4}, row.model)
    paths = {"row": lab.adapter(row), "plain": lab.adapter(plain)}
    found = []
    for fake in (False, True):
        driver = EngineDriver(lab.model(row.model), paths, disable_radix_cache=True)
        graphs = FakeGraphs(driver.engine.runner)
        if fake:
            driver.engine.runner._graphs = graphs
        found.append(answers(driver, row, plain))
        driver.close()
    for eager, replayed in zip(*found, strict=True):
        assert eager.tokens == replayed.tokens
        assert eager.logprobs == pytest.approx(replayed.logprobs, abs=1e-5)
    return graphs


def sampled(row: Row) -> Any:
    return pytest.param(row, id=row.feature, marks=pytest.mark.slow if row.feature in IN_OTHER_WORDS else ())


@pytest.mark.parametrize("row", [sampled(row) for row in SERVED])
def test_what_acts_on_embedding_and_head_needs_no_eager_step(row: Row, lab: Lab) -> None:
    graphs = compare(lab, row)
    assert len(graphs.decodes) == 5  # all decodes of six tokens
    assert len(graphs.others) == 1  # the prompts, too


@pytest.mark.parametrize("row", EAGER, ids=[row.feature for row in EAGER])
def test_what_replaces_modules_between_them_does(row: Row, lab: Lab) -> None:
    graphs = compare(lab, row)
    assert graphs.decodes == graphs.others == []


def test_what_graphs_do_not_take_is_launched_layer_by_layer(lab: Lab) -> None:
    driver = EngineDriver(lab.model("Llama"), {}, disable_radix_cache=True)
    expected = driver.complete([5, 6, 7, 8, 9], None, max_new_tokens=3, ignore_eos=True).tokens
    driver.engine.runner._graphs = graphs = FakeGraphs(driver.engine.runner, pieces=False)
    assert driver.complete([5, 6, 7, 8, 9], None, max_new_tokens=3, ignore_eos=True).tokens == expected
    assert (graphs.decodes, graphs.others) == ([1, 1], [])
    driver.close()


# ---------------------------------------------------------------------- another rank


class Follower:
    """Another rank: its own runner, model, arena and LoRA table. All that it gets from the first are plans as bytes,
    and the bytes of adapters, which do not travel in plans yet."""

    def __init__(self, leader: EngineDriver, paths: dict[str, Path], model: Path, **options: Any):
        self._twin = EngineDriver(model, paths, **options)
        self._runner = self._twin.engine.runner
        self._arena = arena_of(self._twin)
        self._leaders_arena = arena_of(leader)
        self._in_flight: list[Launched] = []
        self.sent = 0

    def execute(self, data: bytes) -> list[int]:
        """The tokens that a step samples. It is read at once, which grammars and penalties must not mind."""
        self.sent += len(data)
        plan = StepPlan.decode(data)
        for change in plan.lora:
            if isinstance(change, LoraInstall):
                self._arena[change.pages] = self._leaders_arena[change.pages]
        self._runner.apply(plan)
        return self._runner.sample(self._runner.forward(plan)).result().token_ids

    def close(self) -> None:
        self._twin.close()


def arena_of(driver: EngineDriver) -> torch.Tensor:
    """uint8 [pages, page_bytes]"""
    return driver.engine.adapters.device._copier._arena


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_runner_that_hears_nothing_but_plans_samples_the_same_tokens(lab: Lab, ahead: int) -> None:
    """Prompts in pieces, a shared prefix, two adapters that take turns at one place, every kind of sampling."""
    rows = {"a": Row("plain", {"r": 4}), "b": Row("other", {"r": 8, "lora_alpha": 32})}
    paths = {name: lab.adapter(row) for name, row in rows.items()}
    options = {"max_loras_per_batch": 1, "chunked_prefill_size": 7, "page_size": 4, "ahead": ahead}
    leader = EngineDriver(lab.model("Llama"), paths, **options)
    follower = Follower(leader, {}, lab.model("Llama"), **options)
    runner = leader.engine.runner
    forward, sample = runner.forward, runner.sample
    found: dict[int, list[int]] = {}
    right: dict[int, list[int]] = {}

    def told(plan: StepPlan) -> Forward:
        launched = forward(plan)
        found[plan.number] = follower.execute(plan.encode())
        return launched

    def noted(forward: Forward) -> Launched:
        launched = sample(forward)
        right[forward.plan.number] = launched.sampled.token_ids.tolist()
        return launched

    runner.forward, runner.sample = told, noted  # type: ignore[method-assign]
    stem = [5, 6, 7, 8, 9, 10, 11, 12]
    kinds: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 3},
        {"logit_bias": {"7": 3.0}, "min_new_tokens": 4, "return_logprob": True, "logprob_start_len": 0},
    ]
    for i, kind in enumerate(kinds * 3):
        leader.submit([*stem, 20 + i], ("a", "b", None)[i % 3], max_new_tokens=6, **kind)
        leader.step()
    leader.run()
    assert found == right
    assert sum(map(len, found.values())) >= sum(len(a.tokens) for a in leader.answers.values()) > 40
    follower.close()
    leader.close()
