"""Compositions against PEFT's `add_weighted_adapter(combination_type="cat")`: tokens and logprobs, in batches that
mix them with each other, with plain adapters and with base.

PEFT multiplies lora_A by weight x scaling and stacks the ranks; the product is the same weighted sum.
"""

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from clear_answers import clear_answer
from fakes.engine_driver import Answer, EngineDriver
from fakes.models import TINY_SIZES, make_adapter, make_tiny_model
from peft import PeftModel

NEW_TOKENS = 12  # as the driver asks for
CLOSE = 1e-4  # largest difference of a logprob
LENGTHS = (1, 9, 33)

ADAPTERS: dict[str, dict[str, Any]] = {
    "qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"},
    "rslora": {"r": 24, "lora_alpha": 6, "target_modules": ["o_proj", "down_proj", "v_proj"], "use_rslora": True},
    "layer1": {"r": 8, "lora_alpha": 16, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    "tables": {"r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}
Mix = tuple[tuple[str, float], ...]
MIXES: list[Mix] = [
    (),
    (("qv", 1.0),),
    (("all", 0.5),),
    (("qv", 0.7), ("all", 0.3)),
    (("qv", 0.3), ("all", 0.7)),
    (("all", -0.4), ("rslora", 2.0)),
    (("qv", 0.5), ("tables", -1.5)),
    (("qv", 1.0), ("all", 0.25), ("rslora", -0.5), ("layer1", 1.5)),
]


@dataclass(frozen=True)
class World:
    """PEFT's answer and logprobs [positions, vocab] for each (mix, prompt)."""

    path: Path
    prompts: list[list[int]]
    answers: dict[tuple[Mix, int], tuple[list[int], torch.Tensor]] = field(repr=False)

    def driver(self, **options: Any) -> EngineDriver:
        return EngineDriver(self.path / "model", {name: self.path / name for name in ADAPTERS}, **options)

    def jobs(self) -> list[tuple[Mix, int]]:
        return [(mix, prompt) for prompt in range(len(self.prompts)) for mix in MIXES]


def with_adapters(base: Any, path: Path) -> PeftModel:
    first, *others = ADAPTERS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, str(path / first), adapter_name=first)
        for name in others:
            model.load_adapter(str(path / name), adapter_name=name)
    return model.eval()


def compose(model: PeftModel, index: int) -> None:
    """Activate MIXES[index] under a name of its own."""
    names, weights = [name for name, _ in MIXES[index]], [weight for _, weight in MIXES[index]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, weights, f"mix{index}", combination_type="cat")
    model.set_adapter(f"mix{index}")


def ask(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor] | None:
    return clear_answer(model, prompt, NEW_TOKENS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("composition")
    base = make_tiny_model(path / "model", "qwen2", seed=3)
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        make_adapter(path / name, path / "model", seed=seed, **config)
    rng = random.Random(1)
    prompts: list[list[int]] = []
    answers: dict[tuple[Mix, int], tuple[list[int], torch.Tensor]] = {}
    peft = with_adapters(base, path)
    while len(prompts) < len(LENGTHS):
        prompt = [rng.randrange(3, TINY_SIZES["vocab_size"]) for _ in range(LENGTHS[len(prompts)])]
        found = {}
        for i, mix in enumerate(MIXES):
            if mix:
                compose(peft, i)
                found[mix] = ask(peft, prompt)
            else:
                with peft.disable_adapter():
                    found[mix] = ask(peft, prompt)
        if all(found.values()):
            answers |= {(mix, len(prompts)): answer for mix, answer in found.items() if answer}
            prompts.append(prompt)
    yield World(path, prompts, answers)
    torch.set_num_threads(threads)


def check(world: World, answer: Answer, mix: Mix, prompt: int) -> None:
    tokens, logprobs = world.answers[mix, prompt]
    assert answer.tokens == tokens, mix
    ids = world.prompts[prompt]
    rows = logprobs[:-1].gather(1, torch.tensor((ids + tokens)[1:])[:, None])[:, 0]
    found = torch.tensor([*(answer.input_logprobs or [None])[1:], *answer.logprobs])
    torch.testing.assert_close(found, rows, rtol=0.0, atol=CLOSE)


def run_all(world: World, driver: EngineDriver) -> None:
    jobs = world.jobs()
    random.Random(2).shuffle(jobs)
    options = {"return_logprob": True, "logprob_start_len": 0}
    rids = [driver.submit(world.prompts[prompt], dict(mix), **options) for mix, prompt in jobs]
    driver.run()
    for rid, (mix, prompt) in zip(rids, jobs, strict=True):
        check(world, driver.answers[rid], mix, prompt)


def test_the_reference_tells_mixes_apart(world: World) -> None:
    for prompt in range(len(LENGTHS)):
        assert len({tuple(world.answers[mix, prompt][0]) for mix in MIXES}) >= len(MIXES) - 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"page_size": 4, "chunked_prefill_size": 5},
        {"max_loras_per_batch": 4, "page_size": 4},  # just enough for the largest
        {"max_loras_per_batch": 4, "lora_eviction_policy": "cost", "max_loaded_loras": 4},
    ],
    ids=str,
)
def test_a_batch_of_everything(world: World, options: dict[str, Any]) -> None:
    driver = world.driver(**options)
    run_all(world, driver)
    run_all(world, driver)  # and from what is cached


def test_little_memory(world: World) -> None:
    """Evictions and preemptions; no composition waits for ever for places that another one holds."""
    pages = sum(info.pages for info in world.driver(page_size=4).infos.values())
    driver = world.driver(
        page_size=4, chunked_prefill_size=7, max_total_tokens=pages * 4 + LENGTHS[-1] + NEW_TOKENS + 8
    )
    run_all(world, driver)
    assert driver.evictions > 0


def test_prefix_hits_are_exact(world: World) -> None:
    """The same weighted sum finds its own KV, whatever the order of its parts; another one never does."""
    driver = world.driver(page_size=4)
    prompt = len(LENGTHS) - 1
    for mix in MIXES:
        answer = driver.complete(world.prompts[prompt], dict(mix), return_logprob=True, logprob_start_len=LENGTHS[-1])
        assert answer.cached_tokens == 0, mix
    for mix in MIXES:
        answer = driver.complete(world.prompts[prompt], dict(reversed(mix)))
        assert answer.cached_tokens == LENGTHS[-1] // 4 * 4
        assert answer.tokens == world.answers[mix, prompt][0]


def test_unloading_a_part_drops_what_it_had_a_part_in(world: World) -> None:
    driver = world.driver(page_size=4)
    for mix in ({"qv": 0.5, "all": 0.5}, {"qv": 1.0}, {"all": 0.5}):
        driver.complete(world.prompts[-1], mix)
    before = driver.stats.prefix_pages
    driver.unload("qv")
    assert driver.stats.prefix_pages == before // 3
    assert driver.complete(world.prompts[-1], {"all": 0.5}).cached_tokens > 0


def test_hits_and_users_are_counted_per_part(world: World) -> None:
    driver = world.driver()
    driver.complete(world.prompts[0], {"qv": 0.5, "all": 0.5})
    driver.complete(world.prompts[0], {"all": 0.5, "rslora": 0.5})
    driver.submit(world.prompts[0], {"qv": 0.5, "all": 0.25})
    driver.step()
    stats = {
        name: next(a for a in driver.stats.adapters if a.version == driver.infos[name].version) for name in ADAPTERS
    }
    assert [(stats[n].hits, stats[n].misses, stats[n].running) for n in ("qv", "all", "rslora", "layer1")] == [
        (1, 1, 1),
        (2, 1, 1),
        (0, 1, 0),
        (0, 0, 0),
    ]


def test_what_could_never_run_is_refused(world: World) -> None:
    driver = world.driver(max_loras_per_batch=3)
    four = dict(MIXES[-1])
    answer = driver.complete(world.prompts[0], four)
    assert answer.finished is not None and answer.finished.kind == "CannotFit"
    assert "leave room for 3" in answer.finished.message
    assert driver.complete(world.prompts[0], dict(list(four.items())[:3])).finished.type == "length"


def test_what_is_not_plain_is_refused(world: World, tmp_path: Path) -> None:
    make_adapter(tmp_path / "dora", world.path / "model", r=4, target_modules=["q_proj"], use_dora=True)
    driver = world.driver()
    driver.load("dora", tmp_path / "dora")
    assert driver.infos["dora"].not_composable_reason == "it uses DoRA"
    assert driver.infos["qv"].not_composable_reason == ""
    for mix in ({"dora": 0.5}, {"dora": 1.0, "qv": 1.0}):
        finished = driver.complete(world.prompts[0], mix).finished
        assert (finished.kind, "cannot be composed: it uses DoRA" in finished.message) == ("BadRequest", True)
    assert driver.complete(world.prompts[0], "dora").finished.type in ("length", "stop")
