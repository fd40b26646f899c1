"""The headline: in a batch that mixes base and adapters, every answer is token for token what transformers + PEFT
give for that request alone, whatever the chunking, the caches, the memory, the evictions and the order of arrival.

All in fp32 with greedy decoding; logprobs agree to 1e-4; with a seed, random answers do not change either. Families
share the values of `IN_EVERY_FAMILY`; what hangs on the engine more than on the model takes one (`IN_EVERYTHING`).
All of them take everything in the slow tier. There two families are tested on ranks that share the model, and all of
it once more with drafts that are verified (`docs/speculation.md`), of which the quick tier takes a few.
Where the reference itself hardly prefers one token over another, rounding could decide: `make_family` takes only
prompts whose every choice is clear, so that a difference is always a bug.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from clear_answers import clear_answer
from fakes.drafters import Foreseer
from fakes.engine_driver import Answer, EngineDriver
from fakes.models import FAMILIES, TINY_SIZES, make_adapter, make_tiny_model

from multilora.engine.messages import Stats
from multilora.engine.scheduling.drafters import DRAFTERS, MakeDrafter
from multilora.engine.scheduling.verify_cost import VerifyCost

NEW_TOKENS = 12
CLOSE = 1e-4  # largest difference of a logprob
LENGTHS = (1, 4, 21, 38)  # of prompts; Mistral's window is 12, Llama 3's original context 32
LONGEST = LENGTHS[-1] + NEW_TOKENS
SHARED = 16  # the last prompt begins like the longest

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "seven": {"r": 16, "lora_alpha": 16, "target_modules": ATTENTION + MLP},
    "rslora": {"r": 64, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
    "gate": {
        "r": 8,
        "lora_alpha": 24,
        "target_modules": ["gate_proj"],
        "rank_pattern": {"layers.1.mlp.gate_proj": 3},
        "alpha_pattern": {"layers.0.mlp.gate_proj": 40},
    },
    "layer1": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["k_proj", "v_proj", "up_proj"],
        "layers_to_transform": [1],
    },
}
NAMES = [None, *ADAPTERS]


@dataclass(frozen=True)
class Reference:
    """What transformers + PEFT say: the answer, and logprobs [positions, vocab] of every token after the first."""

    tokens: list[int]
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Family:
    """One tiny model, its adapters, and the reference's answer for each (adapter or None, prompt).

    ranks: so many share the model in every driver; drafts: every driver verifies some, right ones and wrong ones.
    drivers: those made in a test, which closes them.
    """

    model: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    references: dict[tuple[str | None, int], Reference] = field(repr=False)
    ranks: int = 1
    drafts: bool = False
    drivers: list[EngineDriver] = field(default_factory=list, repr=False)

    def driver(self, names: Iterable[str] = ADAPTERS, **options: Any) -> EngineDriver:
        if self.ranks > options.get("page_size", 16):
            pytest.skip("a rank's share of such a page is too small for a panel of LoRA")
        options["tp_size"] = self.ranks
        if self.drafts:
            options |= {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": 4}
        self.drivers.append(EngineDriver(self.model, {name: self.adapters[name] for name in names}, **options))
        return self.drivers[-1]

    def foreseers(self) -> MakeDrafter:
        """Drafters that know the references."""
        rng = random.Random(9)
        known = [self.prompts[prompt] + r.tokens for (_, prompt), r in self.references.items()]
        return lambda _spec: Foreseer(known, rng)

    def jobs(self, names: Iterable[str] = ADAPTERS) -> list[tuple[str | None, int]]:
        """Every (adapter or None, prompt), neighbours of different adapters."""
        return [(name, prompt) for prompt in range(len(self.prompts)) for name in (None, *names)]


def reference(model: Any, prompt: list[int]) -> Reference | None:
    """None if any choice on the way is not clear."""
    answer = clear_answer(model, prompt, NEW_TOKENS)
    return Reference(*answer) if answer else None


def make_family(family: str, path: Path) -> Family:
    models: dict[str | None, Any] = {None: make_tiny_model(path / "model", family, seed=11)}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        models[name] = make_adapter(path / name, path / "model", seed=seed, **config)
    rng = random.Random(5)
    prompts: list[list[int]] = []
    references: dict[tuple[str | None, int], Reference] = {}
    lengths = [*LENGTHS, LENGTHS[-1]]
    while len(prompts) < len(lengths):
        index = len(prompts)
        shared = prompts[-1][:SHARED] if index == len(LENGTHS) else []
        prompt = shared + [rng.randrange(3, TINY_SIZES["vocab_size"]) for _ in range(lengths[index] - len(shared))]
        answers = {name: reference(model, prompt) for name, model in models.items()}
        if all(answers.values()):
            prompts.append(prompt)
            references |= {(name, index): answer for name, answer in answers.items() if answer}
    return Family(path / "model", {name: path / name for name in ADAPTERS}, prompts, references)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Family]]:
    """Each one made once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cache(lambda name: make_family(name, tmp_path_factory.mktemp(name)))
    torch.set_num_threads(threads)


MOST_STEPS = NEW_TOKENS * len(NAMES)
"""If each adapter came only when the one before had ended."""

# what is special → (options, what the statistics must show at the end)
SCENARIOS: dict[str, tuple[dict[str, Any], Callable[[Stats], bool]]] = {
    "one batch": ({}, lambda s: s.steps < MOST_STEPS and s.preemptions == 0),
    "pages of 1": ({"page_size": 1}, lambda s: s.steps < MOST_STEPS and s.preemptions == 0),
    "chunks of 5": ({"chunked_prefill_size": 5, "page_size": 4}, lambda s: s.steps > 60 and s.cached_tokens > 0),
    "no prefix cache": ({"disable_radix_cache": True}, lambda s: s.prefix_pages == s.cached_tokens == 0),
    "longest prefix first": ({"schedule_policy": "lpm", "max_running_requests": 4}, lambda s: s.steps > 60),
    "two adapters at a time": ({"max_loras_per_batch": 2}, lambda s: sum(a.evictions for a in s.adapters) > 2),
    "one adapter at a time": (
        {"max_loras_per_batch": 1, "lora_eviction_policy": "fifo", "page_size": 4},
        lambda s: sum(a.evictions for a in s.adapters) > 3,
    ),
    "host memory for two": (
        {"max_loras_per_batch": 2, "max_loaded_loras": 2, "lora_eviction_policy": "cost"},
        lambda s: sum(a.fetches for a in s.adapters) > len(ADAPTERS),
    ),
}


IN_EVERYTHING = ("llama3",)
"""The family that every other test runs in the quick tier, with rope that depends on the position."""
SHARING = [name for name in FAMILIES if name != "llama"]
"""It and those that do more than it does; Llama without such a rope is served in the slow tier."""
IN_EVERY_FAMILY: dict[str, tuple[str, list[Any]]] = {
    "everything_at_once": ("scenario", [*SCENARIOS]),
    "prefix_hits": ("page_size", [4, 16]),
    "logprobs": ("chunk", [5, 2048]),
}
"""Tests with a parameter whose values the families share in the quick tier: each takes some, and each value is taken
by one of them."""
ON_RANKS = (("llama3", 2), ("qwen2", 4))
"""Every family: ranks/test_equal.py. Of the second there are more ranks than KV heads."""
WITH_DRAFTS = ("llama3", "mistral", "qwen3")
QUICK_WITH_DRAFTS = (
    "everything_at_once-chunks of 5",
    "prefix_hits-4",
    "preemption",
)
"""Of `IN_EVERYTHING`'s first."""


def is_quick(test: str, family: str, value: Any) -> bool:
    if family not in SHARING:
        return False
    if test not in IN_EVERY_FAMILY:
        return family in IN_EVERYTHING or test == "the_reference_tells_adapters_apart"
    values = IN_EVERY_FAMILY[test][1]
    shares = min(len(SHARING), len(values))
    return values.index(value) % shares == SHARING.index(family) % shares


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" not in metafunc.fixturenames:
        return
    test = metafunc.function.__name__.removeprefix("test_")
    name, values = IN_EVERY_FAMILY.get(test, (None, [None]))
    families = [(f, 1, False, f) for f in FAMILIES]
    families += [(f, ranks, False, f"{f} on {ranks} ranks") for f, ranks in ON_RANKS]
    families += [(f, 1, True, f"{f} with drafts") for f in WITH_DRAFTS]
    families += [(f, ranks, True, f"{f} on {ranks} ranks with drafts") for f, ranks in ON_RANKS[:1]]
    params = []
    for family, ranks, drafts, title in families:
        for value in values:
            what = f"{test}-{value}" if name else test
            quick = (
                is_quick(test, family, value)
                if not drafts
                else family == IN_EVERYTHING[0] and what in QUICK_WITH_DRAFTS
            )
            params.append(
                pytest.param(
                    (family, ranks, drafts),
                    *([value] if name else []),
                    id=f"{title}-{value}" if name else title,
                    marks=() if ranks == 1 and quick else pytest.mark.slow,
                )
            )
    names = ["family", name] if name else ["family"]
    metafunc.parametrize(names, params, indirect=["family"], scope="module")


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, families: Callable[[str], Family]) -> Family:
    name, ranks, drafts = request.param
    return replace(families(name), ranks=ranks, drafts=drafts)


@pytest.fixture(autouse=True)
def closed(family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No driver outlives its test."""
    if family.drafts:
        monkeypatch.setitem(DRAFTERS, "ngram", lambda _config: family.foreseers())
        for name, value in {"known": True, "measured": True, "plain": 1.0, "fixed": 0.0, "per_token": 0.0}.items():
            monkeypatch.setattr(VerifyCost, name, value)  # a draft is always worth it
    yield
    while family.drivers:
        family.drivers.pop().close()


def submit_all(driver: EngineDriver, family: Family, jobs: list[tuple[str | None, int]]) -> dict[str, Any]:
    return {driver.submit(family.prompts[prompt], name): (name, prompt) for name, prompt in jobs}


def check_answers(driver: EngineDriver, family: Family, jobs: dict[str, tuple[str | None, int]]) -> None:
    for rid, job in jobs.items():
        check_answer(driver.answers[rid], family.references[job], job)


def check_answer(answer: Answer, expected: Reference, job: Any) -> None:
    assert answer.tokens == expected.tokens, job
    stopped = expected.tokens[-1] == TINY_SIZES["eos_token_id"]
    assert answer.finished is not None
    assert answer.finished.type == ("stop" if stopped else "length"), job


def test_the_reference_tells_adapters_apart(family: Family) -> None:
    """Else nothing below could fail."""
    for prompt in range(len(family.prompts)):
        answers = {tuple(family.references[name, prompt].tokens) for name in NAMES}
        assert len(answers) == len(NAMES)


def test_everything_at_once(family: Family, scenario: str) -> None:
    options, expected = SCENARIOS[scenario]
    driver = family.driver(**options)
    jobs = submit_all(driver, family, family.jobs())
    driver.run()
    check_answers(driver, family, jobs)
    assert family.drafts or expected(driver.stats), driver.stats
    assert not family.drafts or driver.accepted > 3


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("ahead", "late"), [(0, 0), (1, 0), (1, 3)])
def test_one_batch_takes_a_step_per_token(family: Family, ahead: int, late: int, page_size: int) -> None:
    """Two rounds: at first the copies of adapters come so late, and others go ahead or wait for them; then all are
    there."""
    driver = family.driver(ahead=ahead, late=late, page_size=page_size)
    for more in (late, 0):
        before = driver.stats.steps
        jobs = submit_all(driver, family, family.jobs())
        driver.run()
        check_answers(driver, family, jobs)
        most = (
            NEW_TOKENS + more if family.ranks == 1 else MOST_STEPS
        )  # other ranks say in their own time what they have
        steps = driver.stats.steps - before
        assert family.drafts or NEW_TOKENS <= steps <= most


SMALL = ["qv", "gate", "layer1"]  # adapters of few pages


def tight_driver(family: Family, *, page_size: int, **options: Any) -> EngineDriver:
    """Room for the small adapters, so that many requests start, and then for one full answer."""
    pages = sum(info.pages for info in family.driver(SMALL, page_size=page_size).infos.values())
    return family.driver(SMALL, page_size=page_size, max_total_tokens=pages * page_size + LONGEST, **options)


def never_out_of_room(driver: EngineDriver) -> bool:
    """Where every layer has a window, a text that may start has all that it will hold (`test_sliding_windows.py`)."""
    return driver.engine.scheduler.kv.prefix.groups[0].window is not None


@pytest.mark.parametrize(("page_size", "chunk"), [(1, 2048), (4, 7)])
def test_preemption(family: Family, page_size: int, chunk: int) -> None:
    driver = tight_driver(family, page_size=page_size, chunked_prefill_size=chunk)
    jobs = submit_all(driver, family, family.jobs(SMALL))
    driver.run()
    check_answers(driver, family, jobs)
    assert (
        driver.stats.preemptions > 0 or never_out_of_room(driver) or family.ranks > 1
    )  # a rank's adapters leave other gaps in their pages


@pytest.mark.parametrize("page_size", [4, 16])
def test_adapters_and_kv_compete(family: Family, page_size: int) -> None:
    """Only the largest adapter fits beside one full answer."""
    pages = family.driver(page_size=page_size).infos["rslora"].pages
    driver = family.driver(page_size=page_size, max_total_tokens=pages * page_size + LONGEST)
    jobs = submit_all(driver, family, family.jobs())
    driver.run()
    check_answers(driver, family, jobs)
    assert driver.evictions > 0


def test_prefix_hits(family: Family, page_size: int) -> None:
    """Same prompts again, and prompts that begin alike: cached KV serves its own adapter, never another."""
    driver = family.driver(page_size=page_size)
    long, alike = len(LENGTHS) - 1, len(LENGTHS)
    for name in NAMES:
        first = driver.complete(family.prompts[long], name)
        check_answer(first, family.references[name, long], name)
        assert first.cached_tokens == 0, "KV of another adapter"
    for name in NAMES:
        again = driver.complete(family.prompts[long], name)
        check_answer(again, family.references[name, long], name)
        assert again.cached_tokens == (LENGTHS[long] - 1) // page_size * page_size
        branch = driver.complete(family.prompts[alike], name)
        check_answer(branch, family.references[name, alike], name)
        assert branch.cached_tokens == SHARED
    jobs = submit_all(driver, family, family.jobs())
    driver.run()
    check_answers(driver, family, jobs)


def test_cached_answers_can_be_continued(family: Family) -> None:
    """KV that decoding wrote is found by a longer prompt."""
    driver = family.driver(page_size=4)
    for name in NAMES:
        expected = family.references[name, 2].tokens
        driver.complete(family.prompts[2], name)
        longer = driver.complete(family.prompts[2] + expected[:-3], name, max_new_tokens=3)
        assert longer.tokens == expected[-3:]
        assert longer.cached_tokens >= LENGTHS[2] + len(expected) - 3 - 4


@pytest.mark.parametrize("ahead", [0, 1])
def test_half_a_prompt_in_the_cache(family: Family, ahead: int) -> None:
    """A request that is aborted on its way through the prompt leaves whole pages, and only those of steps that were
    committed."""
    driver = family.driver(ahead=ahead, page_size=4, chunked_prefill_size=5)
    long = len(LENGTHS) - 1
    for steps, name in enumerate(NAMES, 1):
        driver.complete(family.prompts[0], name, max_new_tokens=1)  # the adapter is there; a page was not filled
        rid = driver.submit(family.prompts[long], name)
        for _ in range(steps):
            driver.step()
        driver.abort(rid)
        answer = driver.complete(family.prompts[long], name)
        check_answer(answer, family.references[name, long], name)
        assert answer.cached_tokens == 5 * (steps - ahead) // 4 * 4


@pytest.mark.parametrize(("seed", "ahead"), [(0, 0), (1, 0), (2, 1)])
def test_shuffled_arrival(family: Family, seed: int, ahead: int) -> None:
    """Requests come between steps in any order, each twice, among others that are aborted at any moment."""
    rng = random.Random(seed)
    options = {"ahead": ahead, "page_size": rng.choice([4, 16]), "chunked_prefill_size": rng.choice([5, 16, 64])}
    options |= {"max_loras_per_batch": rng.choice([1, 2, 3, None])}
    pages = family.driver(**options).infos["rslora"].pages
    driver = family.driver(max_total_tokens=pages * options["page_size"] + 2 * LONGEST, **options)
    todo = family.jobs() * 2
    rng.shuffle(todo)
    jobs: dict[str, Any] = {}
    others: list[str] = []
    while todo or driver.engine.busy:
        for name, prompt in [todo.pop() for _ in range(min(len(todo), rng.choice([0, 0, 1, 3])))]:
            jobs[driver.submit(family.prompts[prompt], name)] = (name, prompt)
        if todo and rng.random() < 0.3:
            others.append(driver.submit(rng.choice(family.prompts), rng.choice(NAMES), max_new_tokens=30))
        if others and rng.random() < 0.3:
            driver.abort(others.pop(rng.randrange(len(others))))
        driver.step()
    driver.run()
    check_answers(driver, family, jobs)


TOP = 3


def starts(length: int) -> list[int]:
    """Where prompt logprobs begin: at the first token, …, at the last, nowhere."""
    return [0, min(5, length - 1), length - 1, length, -1]


def submit_for_logprobs(driver: EngineDriver, family: Family, names: Iterable[str] = ADAPTERS) -> dict[str, Any]:
    jobs = {}
    for i, (name, prompt) in enumerate(family.jobs(names)):
        ids = family.prompts[prompt]
        start = starts(len(ids))[i % 5]
        options = {"return_logprob": True, "logprob_start_len": start, "top_logprobs_num": TOP}
        jobs[driver.submit(ids, name, **options)] = (name, prompt, start)
    return jobs


def check_logprobs(answer: Answer, expected: Reference, prompt: list[int], start: int) -> None:
    """Row p of the reference is about token p + 1; the first token of all has no logprob."""
    whole = prompt + expected.tokens
    first = start if start >= 0 else len(prompt)
    logprobs = (answer.input_logprobs or []) + answer.logprobs
    tops = (answer.input_top_logprobs or []) + answer.top_logprobs
    assert len(logprobs) == len(tops) == len(whole) - first
    if first == 0:
        assert logprobs.pop(0) is tops.pop(0) is None
        first = 1
    rows = expected.logprobs[first - 1 : -1]
    close = {"rtol": 0.0, "atol": CLOSE}
    torch.testing.assert_close(
        torch.tensor(logprobs), rows.gather(1, torch.tensor(whole[first:])[:, None])[:, 0], **close
    )
    values = torch.tensor([[value for value, _ in top] for top in tops])
    ids = torch.tensor([[token for _, token in top] for top in tops])
    torch.testing.assert_close(values, rows.topk(TOP).values, **close)
    torch.testing.assert_close(values, rows.gather(1, ids), **close)


def test_logprobs(family: Family, chunk: int) -> None:
    """The second time the prompts come from the cache, but for the positions whose logprobs are wanted."""
    driver = family.driver(page_size=4, chunked_prefill_size=chunk)
    for again in (False, True):
        jobs = submit_for_logprobs(driver, family)
        driver.run()
        for rid, (name, prompt, start) in jobs.items():
            answer, ids = driver.answers[rid], family.prompts[prompt]
            check_answer(answer, family.references[name, prompt], (name, prompt))
            check_logprobs(answer, family.references[name, prompt], ids, start)
            if again and prompt < len(LENGTHS):  # the last one's pages may have stayed private
                needed = max(start, 1) - 1 if 0 <= start < len(ids) else len(ids) - 1
                assert answer.cached_tokens == needed // 4 * 4


def test_logprobs_through_preemption(family: Family) -> None:
    driver = tight_driver(family, page_size=1, chunked_prefill_size=7)
    jobs = submit_for_logprobs(driver, family, SMALL)
    driver.run()
    for rid, (name, prompt, start) in jobs.items():
        check_logprobs(driver.answers[rid], family.references[name, prompt], family.prompts[prompt], start)
    assert driver.stats.preemptions > 0 or never_out_of_room(driver)


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 2.0, "top_k": 20, "frequency_penalty": 0.7, "presence_penalty": -0.5},
    {"temperature": 1.0, "repetition_penalty": 1.3, "logit_bias": {"9": 2.0}, "ignore_eos": True},
    {"temperature": 3.0, "min_new_tokens": 12, "stop_token_ids": [20, 21, 22]},
]


def test_seeded_sampling(family: Family) -> None:
    """The random stream is the request's own: alone or in any company, the same tokens."""
    jobs = family.jobs(SMALL)
    wanted = [SAMPLING[i % len(SAMPLING)] | {"sampling_seed": 100 + i} for i in range(len(jobs))]
    alone = family.driver(SMALL, disable_radix_cache=True)
    expected = [
        alone.complete(family.prompts[prompt], name, **sampling).tokens
        for (name, prompt), sampling in zip(jobs, wanted, strict=True)
    ]
    other = alone.complete(family.prompts[0], **(wanted[0] | {"sampling_seed": 7})).tokens
    assert other != expected[0]
    company = {"random_seed": 3}  # for the requests without a seed: how long they run decides who is preempted
    tight = tight_driver(family, page_size=4, chunked_prefill_size=5, **company)
    for driver in (family.driver(SMALL, **company), tight):
        rng = random.Random(3)
        rids = {}
        for i in rng.sample(range(len(jobs)), len(jobs)):
            name, prompt = jobs[i]
            driver.submit(family.prompts[prompt], name, temperature=1.0)
            rids[i] = driver.submit(family.prompts[prompt], name, **wanted[i])
            if rng.random() < 0.3:
                driver.step()
        driver.run()
        assert [driver.answers[rids[i]].tokens for i in range(len(jobs))] == expected
    assert tight.stats.preemptions > 0 or never_out_of_room(tight)
