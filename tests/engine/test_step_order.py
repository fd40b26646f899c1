"""What is queued when: one step ahead, no commit may find the device without work behind it."""

from typing import Any

import pytest
from fakes.engine import FakeForward, FakeLaunched, answer, make_engine
from fakes.engine_driver import Stepper
from fakes.tiers import FakeTiers

from multilora.engine.engine import MOST_FAILED_STEPS
from multilora.engine.messages import Abort, Output, Submit
from multilora.engine.plan import StepPlan, StepResult
from multilora.params import SamplingParams

PROMPT = [3, 1, 4, 1, 5]


class Traced(Stepper):
    """events: what happened to which step, in order: ("forward", 1), ("sample", 1), ("commit", 1), …"""

    def __init__(self, *, ahead: bool = True, **options: Any):
        self.engine = make_engine(FakeTiers({}, total_pages=64), ahead=ahead, **options)
        self.events: list[tuple[str, int]] = []
        self.tokens: dict[str, list[int]] = {}
        self.endings: dict[str, str] = {}
        runner, scheduler = self.engine.runner, self.engine.scheduler
        forward, sample, commit = runner.forward, runner.sample, scheduler.commit

        def traced_forward(plan: StepPlan) -> FakeForward:
            self.events.append(("forward", plan.number))
            return forward(plan)

        def traced_sample(forward: FakeForward) -> FakeLaunched:
            self.events.append(("sample", forward.plan.number))
            return sample(forward)

        def traced_commit(plan: StepPlan, result: StepResult) -> list[Output]:
            self.events.append(("commit", plan.number))
            return commit(plan, result)

        runner.forward, runner.sample, scheduler.commit = traced_forward, traced_sample, traced_commit

    def submit(self, rid: str, grammar: str | None = None, max_new_tokens: int = 6, **sampling: Any) -> None:
        params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **sampling)
        self.engine.handle(Submit(rid=rid, input_ids=PROMPT, sampling=params, grammar=grammar))

    def take(self, output: Output) -> None:
        self.tokens.setdefault(output.rid, []).extend(output.token_ids)
        if output.finished is not None:
            self.endings[output.rid] = output.finished.type

    def behind(self, number: int, event: str = "forward") -> bool:
        """Whether step `number + 1` had been queued when step `number` was committed."""
        return (event, number + 1) in self.events[: self.events.index(("commit", number))]

    @property
    def steps(self) -> int:
        return self.engine.scheduler.launched


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"repetition_penalty": 1.05},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"logit_bias": {"3": 1.0}},
        {"min_new_tokens": 3},
        {"temperature": 0.6, "top_p": 0.9},
    ],
)
def test_no_step_is_committed_with_nothing_launched_behind_it(sampling: dict[str, Any]) -> None:
    engine = Traced()
    engine.submit("a", **sampling)
    engine.run()
    assert engine.steps == 6
    assert all(engine.behind(n, "sample") for n in range(1, 6)), "forward and sampling of the next step are queued"
    assert engine.tokens["a"] == answer(PROMPT, (), 6, True).tokens


def test_under_a_grammar_the_forward_pass_is_queued_first_and_sampled_after_the_commit() -> None:
    engine = Traced()
    engine.submit("a", grammar="g")
    engine.run()
    expected = [("forward", 1), ("sample", 1)]
    for n in range(1, 6):
        expected += [("forward", n + 1), ("commit", n), ("sample", n + 1)]
    assert engine.events == [*expected, ("commit", 6)]
    assert engine.tokens["a"] == answer(PROMPT, (), 6, True).tokens


def test_one_grammar_in_a_batch_does_not_stop_the_others_forward_pass() -> None:
    engine = Traced()
    for rid, grammar in (("a", None), ("b", "g"), ("c", None)):
        engine.submit(rid, grammar)
    engine.run()
    assert all(engine.behind(n) for n in range(1, engine.steps))
    assert set(engine.endings.values()) == {"length"}


def test_chunks_of_a_prompt_wait_for_no_token() -> None:
    """A grammar has a say only where a token of its request is sampled."""
    engine = Traced(chunk_tokens=2)
    engine.submit("a", grammar="g", max_new_tokens=1)
    engine.run()
    assert engine.steps == 3
    assert engine.events.index(("sample", 2)) < engine.events.index(("commit", 1))


def test_without_one_ahead_steps_follow_each_other() -> None:
    engine = Traced(ahead=False)
    engine.submit("a", grammar="g", max_new_tokens=2)
    engine.run()
    assert engine.events == [(event, n) for n in (1, 2) for event in ("forward", "sample", "commit")]


def test_an_abort_between_two_steps_under_a_grammar_wastes_one_row() -> None:
    engine = Traced()
    engine.submit("a", grammar="g", max_new_tokens=20)
    engine.submit("b", grammar="g")
    engine.step(3)
    engine.engine.handle(Abort("a"))
    engine.run()
    assert engine.endings == {"a": "abort", "b": "length"}
    assert engine.tokens["a"] == answer(PROMPT, (), 2, True).tokens
    assert engine.tokens["b"] == answer(PROMPT, (), 6, True).tokens
    assert engine.engine.runner.tokens_sampled == 2 + 6 + 1


def test_a_preempted_grammar_goes_on_from_its_token_in_flight() -> None:
    engine = Traced()
    engine.submit("a", grammar="g")
    engine.step(2)
    scheduler = engine.engine.scheduler
    request = scheduler.get("a")
    assert request is not None
    scheduler._preempt(request)
    engine.run()
    assert engine.tokens["a"] == answer(PROMPT, (), 6, True).tokens


# ---------------------------------------------------------------------- steps that fail


class Failing(Traced):
    """Launches fail whose numbers are in `bad`, in their forward pass or while they are sampled."""

    def __init__(self, stage: str, bad: set[int], **options: Any):
        super().__init__(**options)
        self.errors: dict[str, str] = {}
        runner = self.engine.runner
        launch = getattr(runner, stage)

        def failing(what: Any) -> Any:
            number = what.number if stage == "forward" else what.plan.number
            if number in bad:
                raise IndexError("index out of range in self")
            return launch(what)

        setattr(runner, stage, failing)

    def take(self, output: Output) -> None:
        super().take(output)
        if output.finished is not None and output.finished.type == "error":
            self.errors[output.rid] = f"{output.finished.kind}: {output.finished.message}"


@pytest.mark.parametrize("stage", ["forward", "sample"])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("grammar", [None, "g"])
def test_a_step_that_fails_ends_only_its_requests(stage: str, ahead: bool, grammar: str | None) -> None:
    right = answer(PROMPT, (), 6, ignore_eos=True).tokens
    driver = Failing(stage, {3}, ahead=ahead, max_running=2)
    for rid in ("a", "b", "late"):
        driver.submit(rid, grammar)
    driver.run()
    for rid in ("a", "b"):
        assert (
            driver.errors[rid].startswith("StepFailed: ") and "IndexError: index out of range" in driver.errors[rid]
        )
        assert driver.tokens[rid] == right[:2], "what came before the step was heard"
    assert driver.endings["late"] == "length" and driver.tokens["late"] == right
    assert driver.engine.scheduler.unfinished == 0 and driver.engine.runner.unread == []


def test_after_an_error_of_the_device_the_engine_ends() -> None:
    driver = Failing("forward", {3})
    driver.engine.runner.sound = False
    driver.submit("a")
    with pytest.raises(IndexError):
        driver.run()


def test_if_every_step_fails_it_is_not_the_fault_of_requests() -> None:
    driver = Failing("forward", set(range(1, 100)))
    for number in range(20):
        driver.submit(str(number))
        if number < MOST_FAILED_STEPS:
            driver.run()
            assert driver.endings[str(number)] == "error"
        else:
            with pytest.raises(IndexError):
                driver.run()
            return
