"""Adapters replaced under running requests, against PEFT: a token before the change is what the old adapter gives,
one after it what the new one gives over the KV that both have written, or over its own where that was computed anew.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import xgrammar
from fakes.engine_driver import Answer, EngineDriver
from fakes.models import make_adapter, make_tiny_model
from peft import PeftModel

from multilora.engine.messages import UseTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about names of arguments

CLOSE = 1e-4  # largest difference of a logprob
CLEAR = 1e-3  # least gap between the two best logits
NEW_TOKENS = 16
SWITCH = 6
INFO = xgrammar.TokenizerInfo([bytes([i]) for i in range(99)], vocab_size=101, stop_token_ids=[2])
LETTERS = [*range(ord("0"), ord("9") + 1), *range(ord("A"), ord("Z") + 1)]
GRAMMAR = xgrammar.Grammar.from_regex("[0-9A-Z]{20}").serialize_json()
PROMPTS = [[5, 17, 80, 33, 9, 61, 44, 3, 12, 90, 71], [28, 50, 6], [99, 41, 18, 77, 23, 65, 14, 8, 52, 37, 60, 11, 4]]


@dataclass
class World:
    """The model and the adapters old and new, as files and in PEFT."""

    path: Path
    peft: PeftModel = field(repr=False)

    def driver(self, **options: Any) -> EngineDriver:
        driver = EngineDriver(self.path / "model", {name: self.path / name for name in ("old", "new")}, **options)
        driver.engine.handle(UseTokenizer(INFO.serialize_json()))
        return driver

    @torch.inference_mode()
    def reference(
        self, prompt: Sequence[int], switch: int, anew: int | None = None, allowed: Sequence[int] | None = None
    ) -> tuple[list[int], list[float]]:
        """Greedy tokens and their logprobs: from index `switch` on by the new adapter, which computes all of the KV
        at index `anew`. allowed: what a token may be."""
        ids, tokens, logprobs, cache = list(prompt), [], [], None
        for i in range(NEW_TOKENS):
            self.peft.set_adapter("new" if i >= switch else "old")
            if i == anew:
                ids, cache = [*prompt, *tokens], None
            out = self.peft(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1]
            choice = logits if allowed is None else logits[list(allowed)]
            best = choice.topk(2)
            assert best.values[0] - best.values[1] > CLEAR, "rounding could decide: another prompt is needed"
            ids = [int(best.indices[0]) if allowed is None else allowed[int(best.indices[0])]]
            tokens += ids
            logprobs.append(float(logits.log_softmax(-1)[ids[0]]))
        return tokens, logprobs

    def check(self, answer: Answer, prompt: Sequence[int], switch: int, **how: Any) -> None:
        tokens, logprobs = self.reference(prompt, switch, **how)
        assert answer.tokens == tokens
        torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(logprobs), rtol=0.0, atol=CLOSE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("updates")
    base = make_tiny_model(path / "model", seed=4)
    for seed, (name, rank) in enumerate((("old", 8), ("new", 16))):
        make_adapter(path / name, path / "model", seed=seed, r=rank, lora_alpha=32, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(base, str(path / "old"), adapter_name="old")
        peft.load_adapter(str(path / "new"), adapter_name="new")
    yield World(path, peft.eval())
    torch.set_num_threads(threads)


def submit(driver: EngineDriver, prompt: Sequence[int], **options: Any) -> str:
    wanted = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "return_logprob": True}
    return driver.submit(prompt, "old", **(wanted | options))


def until(driver: EngineDriver, rid: str, tokens: int) -> None:
    while len(driver.answers[rid].tokens) < tokens:
        driver.step()


def test_the_reference_tells_all_cases_apart(world: World) -> None:
    cases = [world.reference(PROMPTS[0], *case)[0] for case in ((0,), (NEW_TOKENS,), (SWITCH,), (SWITCH, SWITCH))]
    assert len({tuple(tokens) for tokens in cases}) == len(cases)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"page_size": 4, "chunked_prefill_size": 5, "ahead": 1},
        {"late": 3},  # the new adapter is on its way for some steps
        {"tp_size": 2},
        {"tp_size": 2, "ahead": 1},
    ],
    ids=str,
)
def test_tokens_after_the_change_are_the_new_adapters_over_the_kv_of_both(
    world: World, options: dict[str, Any]
) -> None:
    """Of a request in the middle of its answer, one in the middle of its prompt or before it, and one that waits."""
    driver = world.driver(max_running_requests=2, **options)
    first = submit(driver, PROMPTS[0])
    until(driver, first, SWITCH)
    others = [submit(driver, prompt) for prompt in PROMPTS[1:]]
    driver.replace("old", "new")
    driver.run()
    [switch] = driver.answers[first].switches
    assert switch.start == SWITCH + options.get("ahead", 0)
    world.check(driver.answers[first], PROMPTS[0], switch.start)
    for rid, prompt in zip(others, PROMPTS[1:], strict=True):
        assert [switch.start for switch in driver.answers[rid].switches] == [0]
        world.check(driver.answers[rid], prompt, 0)
    assert not driver.engine.adapters.known(1)
    driver.close()


def test_a_prompt_that_is_half_read_begins_anew(world: World) -> None:
    driver = world.driver(page_size=4, chunked_prefill_size=4)
    rid = submit(driver, PROMPTS[2], logprob_start_len=0)
    driver.step(2)
    driver.replace("old", "new")
    driver.run()
    world.check(driver.answers[rid], PROMPTS[2], 0)
    own = driver.complete(PROMPTS[2], "new", return_logprob=True, logprob_start_len=0)
    found, right = driver.answers[rid].input_logprobs, own.input_logprobs
    assert found is not None and right is not None
    torch.testing.assert_close(torch.tensor(found[1:]), torch.tensor(right[1:]), rtol=0.0, atol=CLOSE)


def test_kv_is_computed_anew_where_one_adapter_has_room(world: World) -> None:
    driver = world.driver(max_loras_per_batch=1)
    rid = submit(driver, PROMPTS[0])
    until(driver, rid, SWITCH)
    driver.replace("old", "new")
    driver.run()
    world.check(driver.answers[rid], PROMPTS[0], SWITCH, anew=SWITCH)


def test_a_preemption_after_the_change_leaves_the_new_adapter_alone(world: World) -> None:
    driver = world.driver(page_size=4)
    rid = submit(driver, PROMPTS[0])
    until(driver, rid, SWITCH)
    driver.replace("old", "new")
    until(driver, rid, SWITCH + 4)
    driver.engine.scheduler.retract()
    driver.run()
    world.check(driver.answers[rid], PROMPTS[0], SWITCH, anew=SWITCH + 4)
    again = driver.complete([*PROMPTS[0], *driver.answers[rid].tokens], "new")
    assert again.cached_tokens > 0, "its KV is the new adapter's alone, and shared again"


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_grammar_goes_on(world: World, ahead: int) -> None:
    driver = world.driver(ahead=ahead)
    rid = submit(driver, PROMPTS[0], grammar=GRAMMAR)
    until(driver, rid, SWITCH)
    driver.replace("old", "new")
    driver.run()
    [switch] = driver.answers[rid].switches
    world.check(driver.answers[rid], PROMPTS[0], switch.start, allowed=LETTERS)
