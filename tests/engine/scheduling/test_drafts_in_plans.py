"""Drafts among the plans of the real scheduler, over `fakes.engine`, whose answers are known."""

import random

import pytest
from fakes.drafters import Foreseer
from fakes.engine import VOCAB, answer, make_engine, only
from fakes.engine_driver import Stepper
from fakes.tiers import FakeFile, FakeTiers

from multilora.engine.messages import LoadAdapter, Output, ReplaceAdapter, Submit
from multilora.engine.plan import StepPlan
from multilora.engine.scheduling.request import RequestSpec
from multilora.engine.scheduling.speculation import Speculation
from multilora.params import SamplingParams

PAGE = 4


class Knowing:
    """Drafts the right answer, `wrong` of its tokens changed."""

    def __init__(self, spec: RequestSpec, wrong: tuple[int, ...] = ()):
        right = answer(spec.prompt_ids, spec.adapters, 60, ignore_eos=True).tokens
        self._tokens = spec.prompt_ids + [VOCAB if i in wrong else token for i, token in enumerate(right)]
        self.known = 0

    def extend(self, tokens: list[int]) -> None:
        self.known += len(tokens)

    def propose(self, count: int) -> list[int]:
        return self._tokens[self.known : self.known + count]


def silent(spec: RequestSpec) -> Foreseer:
    """Drafts nothing."""
    drafter = Foreseer([], random.Random(0))
    drafter.propose = lambda count: []  # type: ignore[method-assign]
    return drafter


class Driver(Stepper):
    """speculation: free of charge from the start."""

    def __init__(self, make_drafter, ahead: bool = False, total_pages: int = 64, **files):
        self.now = 0.0
        self.tiers = FakeTiers(files, total_pages=total_pages, page_size=PAGE)
        speculation = None if make_drafter is None else Speculation(make_drafter, most=4)
        self.engine = make_engine(self.tiers, ahead=ahead, clock=self.clock, speculation=speculation)
        self.scheduler = self.engine.scheduler
        if speculation is not None:
            for drafted in (0, 1, 0, 2, 0, 3):
                speculation._cost.observe(drafted, 0.010)
        self.plans: list[StepPlan] = []
        self.heard: dict[str, list[Output]] = {}
        plan = self.scheduler.plan

        def planned() -> StepPlan | None:
            made = plan()
            self.plans += [made] if made else []
            return made

        self.scheduler.plan = planned  # type: ignore[method-assign]

    def clock(self) -> float:
        self.now += 0.005
        return self.now

    def submit(self, rid: str, prompt: list[int], new: int = 12, adapter: int | None = None, **sampling) -> None:
        params = SamplingParams(max_new_tokens=new, ignore_eos=True, **sampling)
        self.engine.handle(Submit(rid=rid, input_ids=prompt, sampling=params, adapters=only(adapter)))

    def load(self, *versions: int) -> None:
        for version in versions:
            self.engine.handle(LoadAdapter(call=version, version=version, path=f"/{version}"))
        self.run()

    def take(self, output: Output) -> None:
        self.heard.setdefault(output.rid, []).append(output)

    def check(self) -> None:
        self.tiers.check()
        for request in self.scheduler.running:
            assert len(request.table.pages) * PAGE >= request.progress.num_scheduled

    def tokens(self, rid: str) -> list[int]:
        return [token for output in self.heard[rid] for token in output.token_ids]

    def drafts(self) -> list[int]:
        return [plan.drafted_tokens for plan in self.plans]


PROMPT = [3, 1, 4, 1, 5]


def test_several_tokens_a_step():
    driver = Driver(Knowing)
    driver.submit("r", PROMPT, new=12)
    driver.run()
    assert driver.tokens("r") == answer(PROMPT, (), 12, ignore_eos=True).tokens
    assert driver.drafts() == [0, 4, 4, 0]  # 1, 5, 5 tokens; the last one needs no draft
    assert [(o.drafted, o.accepted) for o in driver.heard["r"]] == [(0, 0), (4, 4), (4, 4), (0, 0)]


def test_with_nothing_to_draft_plans_are_the_same_bytes():
    plans = []
    for make_drafter in (None, silent):
        for ahead in (False, True):
            driver = Driver(make_drafter, ahead)
            for i in range(5):
                driver.submit(f"r{i}", PROMPT * (i + 1), new=3 + i)
                driver.step()
            driver.run()
            plans.append([plan.encode() for plan in driver.plans])
    assert plans[0] == plans[2]
    assert plans[1] == plans[3]


def test_where_steps_overlap_others_go_on_while_a_draft_is_verified():
    driver = Driver(Knowing, ahead=True)
    driver.submit("drafts", PROMPT, new=20)
    driver.submit("other", PROMPT[::-1], new=20, repetition_penalty=1.5)
    driver.run()
    for rid, prompt in (("drafts", PROMPT), ("other", PROMPT[::-1])):
        assert driver.tokens(rid) == answer(prompt, (), 20, ignore_eos=True).tokens
    assert sum(driver.drafts()) >= 12
    # "other" is in every plan to its last token
    assert len([p for p in driver.plans[:20] if any(c.count == 1 or c.prompt_logprobs for c in p.chunks)]) >= 19
    for before, plan in zip(driver.plans, driver.plans[1:], strict=False):
        slots = {c.slot for c in before.chunks if len(c.answer_positions) > 1}
        assert slots.isdisjoint(c.slot for c in plan.chunks), "planned with a draft in flight"


def test_drafts_push_out_nothing():
    """One page is free beside what two requests hold: a draft takes no more, and preempts nobody."""
    driver = Driver(Knowing, total_pages=6)
    driver.submit("a", PROMPT, new=8)
    driver.submit("b", PROMPT[:3], new=8)
    driver.run()
    assert driver.scheduler.preemptions == 0
    assert sum(driver.drafts()) > 0
    assert driver.tokens("a") == answer(PROMPT, (), 8, ignore_eos=True).tokens
    assert driver.tokens("b") == answer(PROMPT[:3], (), 8, ignore_eos=True).tokens


def test_the_prefix_cache_finds_what_drafts_wrote():
    driver = Driver(lambda spec: Knowing(spec, wrong=(3, 8)))
    driver.submit("first", PROMPT, new=15)
    driver.run()
    known = PROMPT + driver.tokens("first")
    driver.submit("again", known, new=4)
    driver.run()
    assert driver.tokens("again") == answer(PROMPT, (), 19, ignore_eos=True).tokens[15:]
    assert driver.heard["again"][0].cached_tokens == (len(known) - 1) // PAGE * PAGE


@pytest.mark.parametrize("ahead", [False, True])
def test_an_adapter_that_is_replaced_under_a_draft(ahead: bool):
    """The tokens up to the switch are the old one's, and it says where that is."""
    driver = Driver(Knowing, ahead, **{"/1": FakeFile(), "/2": FakeFile()})
    driver.load(1, 2)
    driver.submit("r", PROMPT, new=40, adapter=1)
    driver.step(5)
    assert driver.drafts()[-1] > 0
    driver.engine.handle(ReplaceAdapter(9, 1, 2))
    driver.run()
    (switch,) = [o.switch for o in driver.heard["r"] if o.switch is not None]
    tokens = driver.tokens("r")
    assert len(tokens) == 40
    old = answer(PROMPT, only(1), 40, ignore_eos=True).tokens
    assert 1 < switch.start < 40
    assert tokens[: switch.start] == old[: switch.start]
    assert tokens[switch.start] != old[switch.start]
