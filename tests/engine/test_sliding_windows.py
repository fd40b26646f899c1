"""Layers with a window keep only that, and the answers are transformers' and PEFT's all the same.

The model is Gemma 3's in small: five layers of a window of 12 tokens, then one that sees everything; Mistral's has
the window in every layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import tiny_config, tiny_model
from clear_answers import clear_answer
from fakes.engine_driver import DEVICE, Answer, EngineDriver
from walk import load, make_adapter

NEW_TOKENS = 8
CLOSE = 1e-4
FULL, SLIDING = "full_attention", "sliding_attention"
MODELS = {
    "Gemma3ForCausalLM": ("gemma3_text", [*[SLIDING] * 5, FULL]),
    "MistralForCausalLM": ("mistral", None),
}
PAGE = 4
SLOW = pytest.mark.slow if DEVICE == "cpu" else ()


@dataclass(frozen=True)
class Case:
    """adapter: None: the base model. logprobs: of each token of the answer."""

    prompt: list[int]
    adapter: str | None
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Lab:
    """A model, and what transformers and PEFT say to prompts. The first half of a case's prompt is shared by all."""

    path: Path
    cases: list[Case]

    def driver(self, **options: object) -> EngineDriver:
        names = {case.adapter for case in self.cases if case.adapter}
        adapters = {name: self.path / name for name in sorted(names)}
        return EngineDriver(self.path / "model", adapters, page_size=PAGE, **options)


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lab]:
    """Each one made once."""
    return cache(lambda architecture: make_lab(architecture, tmp_path_factory.mktemp("windows")))


@pytest.fixture(scope="module", params=MODELS)
def lab(request: pytest.FixtureRequest, labs: Callable[[str], Lab]) -> Lab:
    return labs(request.param)


@pytest.fixture(scope="module")
def gemma(labs: Callable[[str], Lab]) -> Lab:
    return labs("Gemma3ForCausalLM")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_lab(architecture: str, path: Path) -> Lab:
    model_type, layers = MODELS[architecture]
    config = tiny_config(model_type, architecture)
    if layers is not None:
        config.num_hidden_layers, config.layer_types = len(layers), layers
    model = tiny_model(architecture, config)
    model.save_pretrained(path / "model")
    plain = make_adapter(path / "a", path / "model", 1, {"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"]})
    dora = make_adapter(path / "b", path / "model", 2, {"r": 8, "target_modules": ["v_proj"], "use_dora": True})
    found = []
    models = {None: load(path / "model"), "a": plain, "b": dora}
    for adapter, model in models.items():
        tries = (case for seed in range(40) if (case := clear_case(model, adapter, seed)) is not None)
        found += [next(tries) for _ in range(2)]
    return Lab(path, found)


def clear_case(model: object, adapter: str | None, seed: int) -> Case | None:
    shared = torch.randint(3, 100, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    own = torch.randint(3, 100, (5 + 13 * seed % 60,), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    found = clear_answer(model, shared + own, NEW_TOKENS)
    if found is None:
        return None
    tokens, logprobs = found
    rows = logprobs[-len(tokens) - 1 : -1]
    return Case(shared + own, adapter, tokens, [float(row[t]) for row, t in zip(rows, tokens, strict=True)])


def check(answer: Answer, case: Case) -> None:
    assert answer.tokens == case.tokens
    torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(case.logprobs), atol=CLOSE, rtol=0)


def ask(driver: EngineDriver, case: Case) -> str:
    return driver.submit(case.prompt, case.adapter, max_new_tokens=NEW_TOKENS, return_logprob=True)


@pytest.mark.parametrize(
    ("chunk", "ahead"), [(7, 1), (512, 0), pytest.param(7, 0, marks=SLOW), pytest.param(512, 1, marks=SLOW)]
)
def test_answers_are_pefts_with_and_without_hits(lab: Lab, chunk: int, ahead: int) -> None:
    driver = lab.driver(chunked_prefill_size=chunk, ahead=ahead)
    assert driver.engine.scheduler.kv._windowed
    for turn in range(2):
        rids = [ask(driver, case) for case in lab.cases]
        driver.run()
        for rid, case in zip(rids, lab.cases, strict=True):
            check(driver.answers[rid], case)
            assert turn == 0 or driver.answers[rid].cached_tokens >= 60, "the whole prompt is in the cache"
    driver.close()


def test_answers_are_pefts_when_pages_run_out(lab: Lab) -> None:
    driver = lab.driver(chunked_prefill_size=16)
    layout = driver.engine.scheduler.kv.prefix
    need = max(driver.engine.scheduler.kv.most_pages(len(case.prompt) + NEW_TOKENS) for case in lab.cases)
    adapters = sum(info.pages for info in driver.infos.values())
    driver.close()
    pages = 3 * need // 2 + adapters + 4 * layout.columns
    driver = lab.driver(chunked_prefill_size=16, max_total_tokens=pages * PAGE // layout.columns)
    cases = (*lab.cases, *reversed(lab.cases))
    rids = [ask(driver, case) for case in cases]
    for _ in range(4):
        driver.step(9)
        driver.engine.scheduler.retract()
    driver.run()
    for rid, case in zip(rids, cases, strict=True):
        check(driver.answers[rid], case)
    assert driver.stats.preemptions and driver.engine.scheduler.kv.reclaimer.clock.now > 0, "pages were evicted"
    driver.close()


@pytest.mark.parametrize("cached", [True, False])
def test_a_long_text_holds_a_sixth_of_its_pages_and_the_windows(gemma: Lab, cached: bool) -> None:
    driver = gemma.driver(chunked_prefill_size=16, disable_radix_cache=not cached, max_total_tokens=2000)
    prompt = torch.randint(3, 100, (230,), generator=torch.Generator().manual_seed(3)).tolist()
    driver.submit(prompt, max_new_tokens=20)
    while driver.stats.generated_tokens < 10:
        driver.step()
    blocks = (230 + 10) // PAGE
    all_layers = blocks * 6
    stats = driver.stats
    assert blocks <= stats.kv_pages <= blocks + 1 + 5 * (12 // PAGE + 2), "all tokens of one layer, five windows"
    assert stats.kv_pages < all_layers / 4
    left_behind = stats.prefix_pages if cached else 0
    assert stats.free_pages + left_behind >= stats.total_pages - stats.adapter_pages - stats.kv_pages
    assert not cached or left_behind, "it can be found again, and evicted"
    driver.run()
    driver.close()


def test_the_door_asks_only_for_what_a_text_will_hold(gemma: Lab) -> None:
    """One of 240 tokens needs 60 pages for the layer that sees everything, and few for the others."""
    driver = gemma.driver(chunked_prefill_size=8, max_total_tokens=100)  # 150 pages
    prompt = torch.randint(3, 100, (230,), generator=torch.Generator().manual_seed(3)).tolist()
    assert driver.stats.total_pages < 60 * 6
    answer = driver.complete(prompt, max_new_tokens=10)
    reference = clear_answer(load(gemma.path / "model"), prompt, 10)
    assert answer.finished is not None and answer.finished.type == "length"
    assert reference is None or answer.tokens == reference[0]
    driver.close()
