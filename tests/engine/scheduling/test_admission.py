"""Who starts when: order, adapters that take turns, and waiting a moment for others, by a clock of our own."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from statistics import mean
from typing import Any

import pytest
from fakes.timed_engine import IDLE, TOKENS, Timed

from multilora.engine.scheduling import policy


def together(world: Timed, adapters: Iterable[int]) -> list[float]:
    """First tokens of one request for each adapter, all of them submitted now."""
    for adapter in adapters:
        world.submit(f"{adapter}", adapter)
    world.run()
    return [world.first[f"{adapter}"] for adapter in adapters]


# ---------------------------------------------------------------------- waiting for each other


@pytest.mark.parametrize("ahead", [False, True])
def test_four_loads_of_2_ms_before_a_prefill_of_20_ms(ahead):
    """SGLang's documentation: 28 ms if they go together, 82 ms if each goes as it comes."""
    world = Timed(lambda n: 0.020, 4, copy_seconds=0.002, ahead=ahead)
    world.learn()
    times = together(world, range(1, 5))
    assert max(times) <= 0.028 + 2 * IDLE
    assert world.sizes == [4]


def batched(count: int, copy: float, step: Callable[[int], float]) -> float:
    """Mean first token if all wait for the last."""
    return count * copy + step(count * TOKENS)


def split(count: int, copy: float, step: Callable[[int], float]) -> float:
    """Mean first token if a step runs as soon as somebody is ready, with all who are."""
    ready = [copy * (i + 1) for i in range(count)]
    now, total = 0.0, 0.0
    while ready:
        now = max(now, ready[0])
        going = [t for t in ready if t <= now]
        now += step(len(going) * TOKENS)
        total += now * len(going)
        ready = ready[len(going) :]
    return total / count


def worlds() -> Iterator[Any]:
    """Half of them in the quick tier, with every pair of values."""
    for i, count in enumerate((2, 3, 4, 8)):
        for j, copy in enumerate((0.001, 0.002, 0.005, 0.010, 0.030, 0.1)):
            for k, per_token in enumerate((0.0, 0.001)):
                for m, fixed in enumerate((0.004, 0.020)):
                    quick = (i + j + k + m) % 2 == 0 and copy != 0.030
                    marks = () if quick else pytest.mark.slow
                    yield pytest.param(count, copy, per_token, fixed, marks=marks)


@pytest.mark.parametrize(("count", "copy", "per_token", "fixed"), [*worlds()])
def test_no_worse_than_the_better_of_batched_and_split(count, copy, per_token, fixed):
    def step(tokens: int) -> float:
        return fixed + per_token * tokens if tokens else 0.001

    world = Timed(step, count, copy_seconds=copy)
    for i in range(40):
        world.submit(f"{i}", None)
        world.submit(f"also {i}", None) if i % 2 else None
        world.run()
    world.learn()
    best = min(batched(count, copy, step), split(count, copy, step))
    assert mean(together(world, range(1, count + 1))) <= best * 1.02 + count * IDLE


def test_nobody_waits_for_an_adapter_that_is_far_away():
    world = Timed(lambda n: 0.020, 2, copy_seconds=0.030)
    world.learn()
    times = together(world, (1, 2))
    assert times == pytest.approx([0.050, 0.080], abs=3 * IDLE)


def test_nobody_waits_longer_than_a_step_takes():
    """Even if copies come to a halt."""
    world = Timed(lambda n: 0.020, 4, copy_seconds=0.002)
    world.learn()
    for adapter in (1, 2, 3, 4):
        world.submit(f"{adapter}", adapter)
    world.step()
    for version in (2, 3, 4):
        world.tiers.device._in_flight[version].copy.at += 5.0
    world.run()
    assert world.first["1"] <= 0.002 + 0.020 + 0.020 + 4 * IDLE
    assert world.first["2"] > 5.0


def test_those_who_decode_go_on_while_others_wait():
    world = Timed(lambda n: 0.020 if n else 0.001, 5, copy_seconds=0.002)
    world.learn()
    world.submit("stream", None, tokens=60)
    world.step()
    together(world, range(1, 5))
    gaps = [b - a for a, b in pairwise(world.tokens["stream"])]
    assert sorted(gaps)[-2] <= 0.001 + IDLE, "one step with prompts at most held the stream up"
    assert world.sizes == [1, 4]


def test_a_full_step_waits_for_nobody():
    """Who could not go with it anyway is no reason to wait."""
    world = Timed(lambda n: 0.020, 3, copy_seconds=0.002, chunk_tokens=TOKENS)
    world.learn()
    times = together(world, (1, 2, 3))
    assert times == pytest.approx([0.022, 0.042, 0.062], abs=3 * IDLE)


# ---------------------------------------------------------------------- adapters take turns


@pytest.mark.parametrize("ahead", [False, True])
def test_requests_of_one_adapter_go_together_where_few_fit_the_device(ahead):
    """Requests for six adapters in turn, room for two: each adapter comes once."""
    world = Timed(lambda n: 0.010, 6, copy_seconds=0.001, max_device_pages=2, max_running=8, ahead=ahead)
    before = world.tiers.copier.started
    for i in range(24):
        world.submit(f"{i % 6 + 1}.{i // 6}", i % 6 + 1, tokens=4)
    world.run()
    assert world.tiers.copier.started - before == 6
    assert [rid.partition(".")[0] for rid in world.order[:8]] == ["1"] * 4 + ["2"] * 4
    assert sorted(world.first) == sorted(world.order), "everybody was served, once"


def test_very_many_adapters_each_come_once():
    """However far ahead adapters are brought in, none leaves before it was used."""
    world = Timed(lambda n: 0.010, 60, copy_seconds=0.001, max_device_pages=10, max_running=4, chunk_tokens=10)
    for adapter in range(1, 61):
        world.submit(f"{adapter}", adapter, tokens=3)
    world.run()
    assert world.tiers.copier.started == 60
    assert world.order == [f"{adapter}" for adapter in range(1, 61)]


def test_requests_that_cannot_start_yet_keep_no_adapters(monkeypatch):
    """Twice over more adapters than are looked at: those left over from the first time are wanted again, but late."""
    monkeypatch.setattr(policy, "LOOK_AT", 20)
    world = Timed(lambda n: 0.010, 50, copy_seconds=0.001, max_device_pages=10, max_running=4, chunk_tokens=10)
    seconds = []
    for turn in (1, 2):
        before = world.now
        for adapter in range(1, 51):
            world.submit(f"{adapter}.{turn}", adapter, tokens=3)
        world.run()
        seconds.append(world.now - before)
    assert seconds[1] <= 1.05 * seconds[0]


def test_the_next_adapters_come_while_the_batch_is_full():
    world = Timed(lambda n: 0.010, 3, copy_seconds=0.015, max_running=1)
    for adapter in (1, 2, 3):
        world.submit(f"{adapter}", adapter, tokens=4)
    world.run()
    assert world.first["2"] - world.first["1"] == pytest.approx(0.040, abs=2 * IDLE), "no pause"
    assert world.first["3"] - world.first["2"] == pytest.approx(0.040, abs=2 * IDLE)


def test_an_adapter_that_somebody_waits_for_stays_until_the_oldest_is_old():
    """Room for one adapter. One request on it is followed by another, every three seconds; one on another adapter has
    come first of all and goes when nobody is left who came soon enough after it."""
    world = Timed(lambda n: 1.0, 2, copy_seconds=0.001, max_loras_per_batch=1, max_running=8, max_wait=5.0)
    world.submit("a0", 1, tokens=3)
    world.step()
    world.step()
    world.submit("b", 2)
    for i in range(1, 9):
        world.submit(f"a{i}", 1, tokens=3)
        for _ in range(2):
            world.step()
    world.run()
    assert 2 <= world.order.index("b") <= 4
    assert sorted(world.order) == sorted(["b", *(f"a{i}" for i in range(9))])


def test_a_long_queue_is_not_looked_at_as_a_whole(monkeypatch):
    monkeypatch.setattr(policy, "LOOK_AT", 20)
    world = Timed(lambda n: 0.010, 50, copy_seconds=0.010)
    for adapter in range(1, 51):
        world.submit(f"{adapter}", adapter)
    world.step()
    assert sum(r.hit_counted for r in world.engine.scheduler.waiting) == 20
    world.run()
    assert len(world.first) == 50


def test_the_books_of_demand():
    world = Timed(lambda n: 0.010, 2, copy_seconds=0.001, max_running=1)
    world.submit("a", 1, tokens=5)
    world.submit("b", 2)
    world.submit("c", 2)
    world.step()
    assert demand(world) == [1, 2]
    world.step()
    world.engine.scheduler.end("c", None)
    assert demand(world)[1] == 1
    world.run()
    assert demand(world) == [0, 0]


def demand(world: Timed) -> list[int]:
    return [adapter.queued_demand for adapter in world.tiers.store.loaded()]
