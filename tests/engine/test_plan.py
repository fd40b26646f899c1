"""A plan is data: whatever the scheduler plans survives its way as bytes."""

import random

import msgspec
import pytest
from fakes.engine import make_engine
from fakes.tiers import FakeFile, FakeTiers
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.engine.messages import Finish, LoadAdapter, Submit
from multilora.engine.plan import Chunk, StepPlan
from multilora.params import SamplingParams

ADAPTERS = 4


def plans(seed: int, ahead: bool) -> list[StepPlan]:
    """A loaded scheduler's plans: pieces of prompts, adapters that take turns, preemption, logprobs, grammars."""
    rng = random.Random(seed)
    files = {f"/{i}": FakeFile(rank=rng.choice([8, 16])) for i in range(1, ADAPTERS + 1)}
    files["/1"].invocation_tokens = (1, 1)
    engine = make_engine(FakeTiers(files, total_pages=20, max_loras_per_batch=2), ahead=ahead, chunk_tokens=5)
    for version in range(1, ADAPTERS + 1):
        engine.handle(LoadAdapter(call=version, version=version, path=f"/{version}"))
    found = []
    forward = engine.runner.forward
    engine.runner.forward = lambda plan: (found.append(plan), forward(plan))[1]
    for i in range(12):
        sampling = SamplingParams(
            max_new_tokens=rng.randrange(8),
            temperature=rng.choice([0.0, 0.7]),
            repetition_penalty=rng.choice([1.0, 1.1]),
            logit_bias=rng.choice([None, {"3": -0.5}]),
            stop_token_ids=rng.choice([None, [5, 6]]),
        )
        version = rng.randrange(ADAPTERS + 1)
        message = Submit(
            rid=str(i),
            input_ids=[rng.choice([1, 2, 3]) for _ in range(rng.randrange(1, 14))],
            sampling=sampling,
            adapters=((version, rng.choice([1.0, 0.3]) if version > 1 else 1.0),) if version else (),
            return_logprob=rng.random() < 0.5,
            logprob_start_len=rng.choice([-1, 0]),
            top_logprobs_num=rng.randrange(3),
            grammar=rng.choice([None, "g"]),
        )
        engine.handle(message)
        engine.step()
    engine.handle(Finish("3"))
    while engine.busy:
        engine.step()
    return found


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_plan_survives_its_way_as_bytes(seed: int, ahead: bool) -> None:
    found = plans(seed, ahead)
    assert [plan.number for plan in found] == list(range(1, len(found) + 1))
    for plan in found:
        assert StepPlan.decode(plan.encode()) == plan
    assert any(plan.lora for plan in found)
    assert any(plan.free for plan in found)
    assert ahead == any(not chunk.token_ids for plan in found for chunk in plan.chunks)


def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        StepPlan.decode(msgspec.msgpack.encode([1, "chunks"]))


def test_a_chunk_may_sample_several_positions() -> None:
    several = StepPlan(1, [Chunk(7, 3, 4, [1, 2, 3, 4], answer_positions=(5, 6, 7)), Chunk(2, 0, 2, [1, 2])])
    assert StepPlan.decode(several.encode()) == several
    assert several.sampling_slots == [7, 7, 7]
    assert (several.tokens, several.prompt_tokens) == (6, 6)


def test_a_decode_step_is_small_on_the_wire() -> None:
    chunks = [Chunk(slot, 1000, 1, [], (slot,), (1.0,), 0, (17,), True) for slot in range(64)]
    assert len(StepPlan(1, chunks).encode()) < 64 * 40
