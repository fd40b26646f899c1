"""Drafts on a GPU, where steps overlap: the same tokens as without, and steps with drafts are replayed as small steps
with prompts are. MULTILORA_TEST_DEVICE=cpu tries most of it out without a GPU."""

import random
from typing import Any

import pytest
import torch
from exactness import SLACK
from fakes.drafters import Foreseer
from gpu_family import ADAPTERS, DEVICE, EXACT, Family, equal, judged, make_family, run

from multilora.engine.execution.cuda_graphs import GraphedStep
from multilora.engine.scheduling.drafters import DRAFTERS
from multilora.engine.scheduling.verify_cost import VerifyCost

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu] + [cuda] * (DEVICE == "cuda")
WITH_DRAFTS = {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": 5}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llama"), "llama", ADAPTERS)


@pytest.fixture(autouse=True)
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"known": True, "measured": True, "plain": 1.0, "fixed": 0.0, "per_token": 0.0}.items():
        monkeypatch.setattr(VerifyCost, name, value)


def foresee(monkeypatch: pytest.MonkeyPatch, family: Family, answers: dict[Any, Any]) -> None:
    """Drafts that know these answers, and are wrong now and then."""
    rng = random.Random(3)
    known = [family.prompts[prompt] + answer.tokens for (_, prompt), answer in answers.items()]
    monkeypatch.setitem(DRAFTERS, "ngram", lambda _config: lambda _spec: Foreseer(known, rng))


def test_tokens_are_those_without_drafts(llama: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llama.driver(**EXACT)
    expected = run(plain, llama, llama.jobs())
    plain.close()
    foresee(monkeypatch, llama, expected)
    driver = llama.driver(**EXACT, **WITH_DRAFTS)
    for _ in range(2):  # the second time with the KV that drafts have left
        for job, answer in run(driver, llama, llama.jobs()).items():
            assert equal(answer, expected[job]), job
    assert driver.accepted > 50
    driver.close()


def test_steps_with_drafts_are_replayed(llama: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, where logprobs are judged."""
    plain = llama.driver()
    foresee(monkeypatch, llama, run(plain, llama, llama.jobs()))
    plain.close()
    driver = llama.driver(**WITH_DRAFTS)
    replayed: list[GraphedStep | None] = []
    runner = driver.engine.runner
    graphed = runner._graphed

    def watched(plan: Any, batch: Any, scope: Any) -> GraphedStep | None:
        found = graphed(plan, batch, scope)
        if plan.drafted_tokens and plan.tokens <= 256:
            replayed.append(found)
        return found

    runner._graphed = watched  # type: ignore[method-assign]
    answers = run(driver, llama, llama.jobs())
    assert len(replayed) > 3
    assert DEVICE == "cpu" or None not in replayed
    result = judged(llama, answers.items())
    assert result.error <= SLACK * result.theirs
    driver.close()
