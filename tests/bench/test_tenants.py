"""`bench.tenants` with a tiny model, and the workloads of `bench/tenant_trace.py`."""

import gc
from collections import Counter
from collections.abc import Iterator

import pytest

from bench.gpu.sizes import SIZES
from bench.tenant_trace import ADAPTERS, MODEST, modest_only, trace, turns
from bench.tenants import Sizes, World, trace_rows, turns_rows
from multilora.engine.scheduling.policy import POLICIES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    sizes = Sizes(SIZES["tiny"][0], slots=4, prompt=6, answer=3, seconds=0.2, turns=6)
    made = World(tmp_path_factory.mktemp("tenants"), "cpu", sizes)
    yield made
    made.engine.close()
    gc.unfreeze()


def test_the_trace_is_measured(world: World) -> None:
    rows = {row["row"]: row for row in trace_rows(world)}
    assert len(rows) == 7 and all(row["value"] > 0 for row in rows.values())
    by_policy = [rows[f"all tenants, {policy}"]["value"] for policy in ("fair", "fcfs")]
    assert rows["throughput, fair over fcfs"]["value"] == pytest.approx(by_policy[0] / by_policy[1], rel=1e-3)


def test_adapters_take_turns_in_few_places(world: World) -> None:
    rows = turns_rows(world)
    assert [row["row"].rpartition(", ")[2] for row in rows] == ["resident", "fair", "fcfs"] * 2
    assert world.engine.report.stats().slots_used <= 8, "the last case has 8 places"


def test_the_policy_changes_between_runs(world: World) -> None:
    scheduler = world.engine.scheduler
    for name in ("fair", "fcfs"):
        world.replay(turns(2, 1e3, 1, prompt=4, answer=1), name)
        assert isinstance(scheduler.policy._policy, POLICIES[name])
    assert scheduler._admission._policy is scheduler.policy


def test_the_trace_asks_for_every_adapter() -> None:
    arrivals = trace(20.0, 10.0, 1.0)
    assert {one.adapter for one in arrivals} == set(range(ADAPTERS))
    assert {one.tenant for one in modest_only(arrivals)} == set(MODEST)
    assert arrivals == sorted(arrivals, key=lambda one: one.seconds) and arrivals[-1].seconds < 20.0


def test_turns_come_at_the_rate() -> None:
    arrivals = turns(1000, 50.0, 6, prompt=5, answer=7)
    assert 17 < arrivals[-1].seconds < 23
    assert all(100 < count < 240 for count in Counter(one.adapter for one in arrivals).values())
    assert {(one.prompt, one.answer) for one in arrivals} == {(5, 7)}
