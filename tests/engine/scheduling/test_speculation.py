"""Who drafts, and when it is given up: simulated steps whose seconds the test says. What a draft does to a request:
`test_commits.py`; to a plan: `test_drafts_in_plans.py`."""

import random
from dataclasses import dataclass

import pytest

from multilora.engine.messages import Submit
from multilora.engine.plan import Chunk, StepPlan
from multilora.engine.scheduling.request import Request, RequestSpec
from multilora.engine.scheduling.speculation import (
    PLAIN_AFTER,
    READ_AHEAD,
    Speculation,
    best_length,
    expected,
)
from multilora.params import Composition, SamplingParams

PLAIN = 0.010  # seconds of a step


class Copying:
    """Drafts as many tokens as it is asked for."""

    def __init__(self, spec: RequestSpec):
        self.known = 0

    def extend(self, tokens: list[int]) -> None:
        self.known += len(tokens)

    def propose(self, count: int) -> list[int]:
        return [7] * count


@dataclass
class Costs:
    """Of verifying, beside a plain step."""

    fixed: float = 0.0
    per_token: float = 0.0
    plain: float = PLAIN

    def seconds(self, drafted: int) -> float:
        return self.plain + ((self.fixed + self.per_token * drafted) if drafted else 0.0)


def request(adapters: Composition = (), **sampling) -> Request:
    params = SamplingParams(**({"max_new_tokens": 10**6} | sampling))
    message = Submit(rid="r", input_ids=[1, 2, 3], sampling=params, adapters=adapters)
    made = Request.of(RequestSpec.of(message, None, seed=0, order=0, arrival=0.0, vocab_size=99))
    made.progress.schedule(3, 1)
    made.progress.commit(3)
    made.progress.take_token(9)
    return made


class Simulation:
    """Steps in turn. rates: of each request, how likely a drafted token is right, if those before it are."""

    def __init__(self, rates: list[float], costs: Costs, most: int = 8, seed: int = 0):
        self.rng = random.Random(seed)
        self.costs = costs
        self.rates = {request(adapters=((i, 1.0),)): rate for i, rate in enumerate(rates, 1)}
        self.speculation = Speculation(Copying, most)
        self.tokens = dict.fromkeys(self.rates, 0)
        self.now = 0.0
        self.drafted = 0
        self.plans: list[int] = []

    def step(self) -> None:
        rows = self.speculation.ready(list(self.rates), overlaps=False)
        drafts = self.speculation.drafts(rows, 10**6, number=len(self.plans) + 1, overlaps=False)
        drafted = sum(map(len, drafts.values()))
        self.plans.append(drafted)
        counts = [1 + len(drafts.get(r, [])) for r in rows]
        chunks = [Chunk(0, 0, n, [0] * n, answer_positions=tuple(range(n)), decodes=True) for n in counts]
        seconds = self.costs.seconds(drafted)
        self.now += seconds
        self.speculation.observe_step(StepPlan(len(self.plans), chunks), seconds)
        for one, rate in self.rates.items():
            draft = drafts.get(one, [])
            right = next((i for i in range(len(draft)) if self.rng.random() >= rate), len(draft))
            if draft:
                self.speculation.observe(one, len(draft), right)
            for _ in range(right + 1):
                one.progress.schedule(1, 1)
                one.progress.commit(1)
                one.progress.take_token(9)
            self.tokens[one] += right + 1

    def speed(self, steps: int) -> float:
        """Tokens of all requests, as a multiple of what they get without drafts in the same time."""
        before, tokens = self.now, sum(self.tokens.values())
        for _ in range(steps):
            self.step()
        return (sum(self.tokens.values()) - tokens) / len(self.rates) / ((self.now - before) / self.costs.plain)


def test_repetitive_text_gains_what_drafts_bring():
    assert Simulation([0.95], Costs(per_token=0.0005)).speed(500) > 3.5
    assert Simulation([0.8], Costs(fixed=0.003, per_token=0.0005)).speed(500) > 1.8


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(
    "costs",
    [
        Costs(),
        Costs(per_token=0.0005),
        Costs(per_token=0.003),
        Costs(fixed=0.010),
        Costs(fixed=0.020, per_token=0.002),
    ],
    ids=["free", "cheap", "by the token", "another path", "both"],
)
@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_never_slower(rate: float, costs: Costs, rows: int):
    """From the first step on."""
    assert Simulation([rate] * rows, costs).speed(1000) >= 0.97


def test_each_adapter_by_its_own_acceptance():
    simulation = Simulation([0.9, 0.0], Costs(per_token=0.0007))
    assert simulation.speed(400) > 1.3
    good, bad = simulation.tokens.values()
    assert good > 2 * bad


def test_what_became_worth_it_is_found_again():
    simulation = Simulation([0.0], Costs(per_token=0.001))
    simulation.speed(600)
    (one,) = simulation.rates
    simulation.rates[one] = 0.95
    simulation.speed(1200)
    assert simulation.speed(200) > 2


def test_what_is_too_dear_now_is_tried_later():
    simulation = Simulation([0.9], Costs(fixed=0.1))
    assert simulation.speed(300) > 0.9
    simulation.costs.fixed = 0.0
    simulation.speed(1200)
    assert simulation.speed(200) > 2


def test_drafts_become_shorter_where_tokens_cost_more():
    assert best_length(0.8, most=8, price=0.0) == 8
    assert best_length(0.8, most=8, price=0.3) == 4
    assert best_length(0.8, most=8, price=0.9) == 0
    assert best_length(1.0, most=8, price=0.5) == 8


def test_drafts_that_seem_to_cost_nothing_must_be_right_now_and_then():
    """Noise may hide what they cost."""
    simulation = Simulation([0.02], Costs())
    simulation.speed(500)
    drafted = sum(simulation.plans)
    simulation.speed(300)
    assert sum(simulation.plans) - drafted <= 3 * 8


def test_expected_tokens():
    assert expected(0.5, 3) == pytest.approx(0.5 + 0.25 + 0.125)
    assert expected(1.0, 3) == 3
    assert expected(0.0, 3) == 0


def test_a_plain_step_now_and_then_says_what_it_costs():
    simulation = Simulation([1.0], Costs())
    for _ in range(3 * PLAIN_AFTER):
        simulation.step()
    assert simulation.plans[:3] == [0, 0, 0]
    assert simulation.plans.count(0) == 3 + 2


def ready_to_draft(*requests: Request) -> Speculation:
    """Drafts are known to cost nothing."""
    speculation = Speculation(Copying, most=4)
    for _ in range(3):
        speculation.observe_step(StepPlan(1, [Chunk(0, 0, 1, [], answer_positions=(0,), decodes=True)]), PLAIN)
        speculation.observe_step(StepPlan(1, [Chunk(0, 0, 2, [3, 4], answer_positions=(0, 1), decodes=True)]), PLAIN)
    speculation.ready(requests, overlaps=False)
    return speculation


@pytest.mark.parametrize(
    "sampling", [{"repetition_penalty": 1.1}, {"frequency_penalty": 0.1}, {"presence_penalty": 0.1}]
)
def test_penalties_have_no_drafts(sampling: dict[str, float]):
    penalised, plain = request(**sampling), request(temperature=0.7, logit_bias={"3": 1.0})
    assert list(ready_to_draft().drafts([penalised, plain], 100, number=1, overlaps=False)) == [plain]


def test_a_draft_ends_with_the_answer_and_with_the_step():
    one = request(max_new_tokens=3)
    assert ready_to_draft(one).drafts([one], 100, number=1, overlaps=False) == {one: [7]}
    assert ready_to_draft(one).drafts([one], 0, number=1, overlaps=False) == {}
    rows = [request(), request(), request()]
    assert [len(d) for d in ready_to_draft(*rows).drafts(rows, 6, number=1, overlaps=False).values()] == [4, 2]


def test_long_prompts_are_read_over_several_plans():
    one = request()
    one.spec.prompt_ids[3:] = range(2 * READ_AHEAD)
    one.progress.num_prompt += 2 * READ_AHEAD
    speculation = ready_to_draft(one)
    for _ in range(2):
        assert speculation.drafts([one], 100, number=1, overlaps=False) == {}
        speculation.ready([one], overlaps=False)
    assert speculation.drafts([one], 100, number=1, overlaps=False)


def test_where_steps_overlap_a_request_waits_for_the_token_that_a_draft_follows():
    waits, others = request(), [request(repetition_penalty=1.1) for _ in range(2)]
    speculation = ready_to_draft()
    for one in (waits, *others):
        one.progress.schedule(1, 1)  # its last token is on the device
    assert speculation.ready([waits, *others], overlaps=True) == others
    waits.progress.commit(1)
    waits.progress.take_token(7)
    assert speculation.ready([waits, *others], overlaps=True) == [waits, *others]
    assert list(speculation.drafts([waits, *others], 100, number=1, overlaps=True)) == [waits]
    waits.progress.schedule_draft(4)
    assert speculation.ready([waits, *others], overlaps=True) == others


def test_a_request_that_waits_in_vain_does_so_less_often():
    """Where others run meanwhile, a wait costs a token."""
    one, other = request(), request(repetition_penalty=1.1)
    speculation = ready_to_draft()
    waited = 0
    for _ in range(200):
        one.progress.schedule(1, 1)
        held = one not in speculation.ready([one, other], overlaps=True)
        waited += held
        one.progress.commit(1)
        one.progress.take_token(3)
        if held:
            draft = speculation.drafts([one, other], 100, number=1, overlaps=True).get(one)
            if draft:
                speculation.observe(one, len(draft), 0)
    assert 0 < waited <= 12


def test_nothing_is_kept_of_a_request_that_has_ended():
    one = request()
    speculation = ready_to_draft(one)
    assert speculation.drafts([one], 100, number=1, overlaps=False)
    speculation.forget(one)
    assert not speculation._drafters
