"""Activated LoRA against PEFT: the adapter acts from the last occurrence of its invocation tokens in the prompt on.

The KV before that position is the base model's, and is shared with it, exactly: proven by the tokens, the logprobs
and the number of cached tokens.
"""

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.engine_driver import DEVICE, Answer, EngineDriver
from fakes.models import TINY_SIZES, make_adapter, make_tiny_model
from peft.tuners.lora.variants import calculate_alora_offsets

NEW_TOKENS = 12  # as the driver asks for
CLOSE = 1e-4  # largest difference of a logprob
CLEAR = 1e-3  # least gap between the reference's two best logits
PAGE = 4
SEQUENCE = (7, 7, 9)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CAUSAL = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "pair": CAUSAL | {"alora_invocation_tokens": [7, 7]},  # overlaps itself in 7 7 7
    "triple": CAUSAL | {"alora_invocation_tokens": list(SEQUENCE)},
    "plain": CAUSAL,
}
NAMES = [None, *ADAPTERS]
SLOW = pytest.mark.slow if DEVICE == "cpu" else ()


def plan_of(rng: random.Random) -> list[list[int]]:
    """Prompts by where the sequences lie in them. Tokens besides are never 7 or 9."""

    def some(count: int) -> list[int]:
        return [rng.randrange(10, TINY_SIZES["vocab_size"]) for _ in range(count)]

    stem = some(16)
    return [
        [*stem, *SEQUENCE, *some(3)],  # on a page's border
        [*stem, *some(2), *SEQUENCE, *some(6)],  # inside a page
        [*stem, *SEQUENCE, *some(5), *SEQUENCE],  # twice, the last at the very end
        [*SEQUENCE, *some(9)],  # at the very beginning
        [*stem, *some(1), 7, 7, 7, 7, *some(4)],  # only the pair, three times over
        [*stem, *some(7)],  # nowhere: as base
        [9, 7, 7],  # no more than the pair
    ]


@dataclass(frozen=True)
class World:
    """PEFT's answer and logprobs [positions, vocab] for each (adapter, prompt)."""

    path: Path
    prompts: list[list[int]]
    answers: dict[tuple[str | None, int], tuple[list[int], torch.Tensor]] = field(repr=False)

    def driver(self, **options: Any) -> EngineDriver:
        files = {name: self.path / name for name in ADAPTERS}
        return EngineDriver(self.path / "model", files, **({"page_size": PAGE} | options))


def ask(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor] | None:
    """None if any choice on the way is not clear."""
    ids = torch.tensor([prompt])
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        logits = model(input_ids=whole, **offsets(model, ids, whole.shape[1])).logits[0]
    best = logits[len(prompt) - 1 : -1].topk(2).values
    if (best[:, 0] - best[:, 1]).min() < CLEAR:
        return None
    return whole[0, len(prompt) :].tolist(), logits.log_softmax(-1)


def offsets(model: Any, ids: torch.Tensor, length: int) -> dict[str, Any]:
    """PEFT counts from the end: where the prompt activates, in a sequence of `length` tokens. Left to itself, a
    forward pass would look for the tokens in the answer too, which `generate` does not."""
    config = getattr(model, "peft_config", {})
    if not any(c.alora_invocation_tokens for c in config.values()):
        return {}
    [offset] = calculate_alora_offsets(config, "default", ids)
    return {"alora_offsets": [None if offset is None else offset + length - ids.shape[1]]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("activation")
    models: dict[str | None, Any] = {None: make_tiny_model(path / "model", "qwen3", seed=5)}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        models[name] = make_adapter(path / name, path / "model", seed=seed, **config)
    for attempt in range(50):
        prompts = plan_of(random.Random(attempt))
        answers = {(name, i): ask(model, p) for name, model in models.items() for i, p in enumerate(prompts)}
        if all(answers.values()):
            break
    yield World(path, prompts, {key: answer for key, answer in answers.items() if answer})
    torch.set_num_threads(threads)


def activation(name: str | None, prompt: list[int]) -> int:
    """The first token that the adapter acts on; the prompt's length if there is none."""
    wanted = ADAPTERS.get(name or "", {}).get("alora_invocation_tokens")
    if wanted is None:
        return len(prompt) if name is None else 0
    found = [i for i in range(len(prompt)) if prompt[i : i + len(wanted)] == wanted]
    return found[-1] if found else len(prompt)


def check(world: World, answer: Answer, name: str | None, prompt: int) -> None:
    tokens, logprobs = world.answers[name, prompt]
    assert answer.tokens == tokens, (name, prompt)
    rows = logprobs[:-1].gather(1, torch.tensor((world.prompts[prompt] + tokens)[1:])[:, None])[:, 0]
    found = torch.tensor([*(answer.input_logprobs or [None])[1:], *answer.logprobs])
    torch.testing.assert_close(found, rows[len(rows) - len(found) :], rtol=0.0, atol=CLOSE)


def run_all(world: World, driver: EngineDriver, **options: Any) -> None:
    jobs = [(name, prompt) for prompt in range(len(world.prompts)) for name in NAMES]
    random.Random(4).shuffle(jobs)
    rids = [driver.submit(world.prompts[prompt], name, return_logprob=True, **options) for name, prompt in jobs]
    driver.run()
    for rid, (name, prompt) in zip(rids, jobs, strict=True):
        check(world, driver.answers[rid], name, prompt)


def test_the_reference_tells_them_apart(world: World) -> None:
    """Else nothing below could fail: an answer is the base model's exactly where nothing is activated."""
    for name in ADAPTERS:
        for i, prompt in enumerate(world.prompts):
            same = world.answers[name, i][0] == world.answers[None, i][0]
            assert same == (activation(name, prompt) == len(prompt)), (name, i)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"page_size": 1}, marks=SLOW),
        {"page_size": 16},
        pytest.param({"chunked_prefill_size": 5}, marks=pytest.mark.slow),  # the next one is cut, too
        {"chunked_prefill_size": 3, "page_size": 2, "max_loras_per_batch": 1},
        pytest.param({"disable_radix_cache": True}, marks=pytest.mark.slow),
        {"ahead": 1},
    ],
    ids=str,
)
def test_a_batch_of_everything(world: World, options: dict[str, Any]) -> None:
    driver = world.driver(**options)
    run_all(world, driver, logprob_start_len=0)
    run_all(world, driver, logprob_start_len=-1)  # from what is cached


def test_little_memory(world: World) -> None:
    pages = sum(info.pages for info in world.driver().infos.values())
    driver = world.driver(max_total_tokens=(pages + 10) * PAGE, chunked_prefill_size=7)
    run_all(world, driver)
    run_all(world, driver)
    assert driver.stats.preemptions > 0


@pytest.mark.parametrize(
    ("first", "name"),
    [
        ("base", "pair"),
        ("adapter", "triple"),
        pytest.param("base", "triple", marks=pytest.mark.slow),
        pytest.param("adapter", "pair", marks=pytest.mark.slow),
    ],
)
def test_the_prefix_before_activation_is_shared_with_base(world: World, name: str, first: str) -> None:
    """Whoever comes first: whole pages before the position serve the other, and not one page more."""
    for i, prompt in enumerate(world.prompts):
        driver = world.driver()
        one, other = (None, name) if first == "base" else (name, None)
        check(world, driver.complete(prompt, one), one, i)
        answer = driver.complete(prompt, other, return_logprob=True)
        check(world, answer, other, i)
        assert answer.cached_tokens == min(activation(name, prompt), len(prompt) - 1) // PAGE * PAGE
        again = driver.complete(prompt, other)
        assert again.cached_tokens == (len(prompt) - 1) // PAGE * PAGE


def test_two_activated_adapters_share_what_comes_before_both(world: World) -> None:
    driver = world.driver()
    prompt = world.prompts[1]
    driver.complete(prompt, "pair")
    answer = driver.complete(prompt, "triple", return_logprob=True)
    check(world, answer, "triple", 1)
    assert answer.cached_tokens == activation("triple", prompt) // PAGE * PAGE == 16
    assert driver.complete(prompt, "plain").cached_tokens == 0


def test_the_same_tokens_with_another_activation_inside_the_page(world: World) -> None:
    """7 7 7 at the end of a page: whether the pair begins with its second or third 7 depends on the next page."""
    driver = world.driver()
    start = [31, 7, 7, 7]
    alone = world.driver(disable_radix_cache=True)
    for prompt in ([*start, 50, 51], [*start, 7, 51], [*start, 50, 52]):
        answer = driver.complete(prompt, "pair", return_logprob=True, logprob_start_len=5)
        right = alone.complete(prompt, "pair", return_logprob=True, logprob_start_len=5)
        assert (answer.tokens, answer.logprobs) == (right.tokens, pytest.approx(right.logprobs, abs=1e-5))
        if prompt[4:] == [50, 52]:
            assert answer.cached_tokens == 4
        else:
            assert answer.cached_tokens == 0


def test_base_rows_cost_no_adapter(world: World) -> None:
    """Where the sequence is nowhere the adapter is not even brought in."""
    driver = world.driver()
    driver.complete(world.prompts[5], "pair")
    assert driver.stats.slots_used == 0
    driver.complete(world.prompts[0], "pair")
    assert driver.stats.slots_used == 1


def test_it_cannot_be_composed(world: World) -> None:
    driver = world.driver()
    assert driver.infos["pair"].not_composable_reason == "it is an activated LoRA"
    for mix in ({"pair": 0.5}, {"pair": 1.0, "plain": 1.0}):
        finished = driver.complete(world.prompts[0], mix).finished
        assert finished is not None
        assert "cannot be composed: it is an activated LoRA" in finished.message
