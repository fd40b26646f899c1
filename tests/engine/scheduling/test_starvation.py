"""Adapters that have to take turns: the cases in which SGLang lets requests wait for ever, or for very long."""

import pytest
from fakes.timed_engine import Timed

POLICIES = ["fair", "fcfs"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_of_requests_for_the_adapter_that_is_there(policy: str) -> None:
    """sgl-project/sglang#15129: one place, adapter 1 is in use whenever anybody looks, so 2 never starts."""
    world = Timed(lambda n: 0.01, 2, policy=policy, max_loras_per_batch=1, max_running=8, copy_seconds=0.002)
    start, number = world.now, 0
    world.submit("0", adapter=1, tokens=40, tenant="one")
    world.step()
    world.submit("other", adapter=2, tenant="two")
    while "other" not in world.first:
        assert world.now - start < 10, "it starves"
        number += 1
        if number % 5 == 0:  # faster than they end, one at a time
            world.submit(str(number), adapter=1, tokens=40, tenant="one")
        world.step()
    waited = world.first["other"] + world.start - start
    assert waited < (2.0 if policy == "fair" else 7.0)
    world.run()
    assert all(len(tokens) in (1, 40) for tokens in world.tokens.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_twice_as_many_adapters_as_places(policy: str) -> None:
    """sgl-project/sglang#13349: 16 adapters over 8 places, where the median first token came 156 times as late."""
    adapters = 16
    world = Timed(lambda n: 0.01, adapters, policy=policy, max_loras_per_batch=8, max_running=32, copy_seconds=0.002)
    start = world.now
    for i in range(96):
        world.submit(str(i), adapter=1 + i % adapters, tokens=20, tenant=str(i % adapters))
    world.run()
    assert len(world.first) == 96
    work = 96 * 20 * 0.01 / 32  # if all slots were taken all the time
    assert world.now - start < 3 * work


def test_an_adapter_drains_while_the_others_go_on() -> None:
    """Two places, both flooded by one tenant: the fewer requests run on one of them, the sooner it goes."""
    world = Timed(lambda n: 0.01, 3, policy="fair", max_loras_per_batch=2, max_running=6, copy_seconds=0.002)
    for i in range(12):
        world.submit(f"flood {i}", adapter=1 + i % 2, tokens=30, tenant="greedy")
    world.step(5)
    start, number = world.now, 12
    world.submit("modest", adapter=3, tenant="modest")
    while "modest" not in world.first:
        assert world.now - start < 5, "it starves"
        if len(world.engine.scheduler.waiting) < 6:
            world.submit(f"flood {number}", adapter=1 + number % 2, tokens=30, tenant="greedy")
            number += 1
        world.step()
    waited = world.first["modest"] + world.start - start
    assert waited < 2.0
    sampled = sum(start < moment <= start + waited for moments in world.tokens.values() for moment in moments)
    assert sampled > 0.7 * 6 * waited / 0.01, "the slots are used meanwhile"
