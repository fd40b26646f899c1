"""Statistics: the step loop pays for adapters that have changed, not for those that are loaded.

Covers `adapter_stats.py` too.
"""

import msgspec
import pytest
from fakes.engine import make_engine, only
from fakes.tiers import FakeFile, FakeTiers

from multilora.adapters.lifecycle.disabled import DisabledStore
from multilora.adapters.lifecycle.version import AdapterVersion
from multilora.engine.adapter_stats import AdapterStatsTable
from multilora.engine.engine import Engine
from multilora.engine.messages import LoadAdapter, Submit, UnloadAdapter
from multilora.engine.stats import StatsReporter
from multilora.params import SamplingParams

IDLE = 10_000


def engine_with(adapters: int) -> Engine:
    """Versions 1 … `adapters`, loaded."""
    tiers = FakeTiers({f"/{i}": FakeFile() for i in range(1, adapters + 1)}, total_pages=64)
    engine = make_engine(tiers)
    for version in range(1, adapters + 1):
        engine.handle(LoadAdapter(call=version, version=version, path=f"/{version}"))
    while engine.busy:
        engine.step()
    return engine


def run(engine: Engine, *versions: int) -> None:
    for version in versions:
        sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
        engine.handle(Submit(rid=f"r{version}", input_ids=[3, 4, 5], sampling=sampling, adapters=only(version)))
    while engine.busy:
        engine.step()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Versions any of whose fields has been read."""
    found: set[int] = set()
    get = AdapterVersion.__getattribute__

    def counted(adapter: AdapterVersion, name: str) -> object:
        found.add(get(adapter, "version"))
        return get(adapter, name)

    monkeypatch.setattr(AdapterVersion, "__getattribute__", counted)
    return found


def test_idle_adapters_cost_steps_and_updates_nothing(reads: set[int]) -> None:
    engine = engine_with(IDLE)
    assert len(engine.report.stats_update().adapters) == IDLE, "the first one tells of all"
    run(engine, 7, 8)
    engine.report.stats_update()
    reads.clear()
    run(engine, 7, 9)
    update = engine.report.stats_update()
    assert {a.version for a in update.adapters} == reads == {7, 9}
    assert update.slots_used == 3 and update.slots_total == 64
    assert engine.report.stats_update().adapters == []


def test_the_updates_add_up_to_the_whole_picture() -> None:
    engine, table = engine_with(4), AdapterStatsTable()
    merged = table.merge(engine.report.stats_update())
    assert merged == engine.report.stats()
    run(engine, 1, 3)
    assert table.merge(engine.report.stats_update()) == engine.report.stats()
    engine.handle(UnloadAdapter(call=9, version=3))
    engine.step()
    update = msgspec.msgpack.decode(msgspec.msgpack.encode(engine.report.stats_update()), type=type(merged))
    assert (update.unloaded, update.adapters) == ([3], [])
    assert table.merge(update) == engine.report.stats()
    assert [a.version for a in engine.report.stats().adapters] == [1, 2, 4]


def test_a_version_that_was_never_told_of_is_not_told_to_be_gone() -> None:
    engine = engine_with(2)
    engine.handle(UnloadAdapter(call=9, version=2))
    engine.step()
    update = engine.report.stats_update()
    assert ([a.version for a in update.adapters], update.unloaded) == ([1], [])


def test_without_lora_there_is_nothing_to_tell() -> None:
    engine = engine_with(0)
    update = StatsReporter(engine.scheduler, DisabledStore()).stats_update()
    assert (update.adapters, update.unloaded, update.slots_used, update.slots_total) == ([], [], 0, 0)


def test_steps_are_counted_by_their_tokens() -> None:
    engine = engine_with(1)
    run(engine, 1)  # a prompt of 3 tokens and one generated, then one more
    stats = engine.report.stats()
    assert sum(stats.step_tokens) == stats.steps == 2
    assert [i for i, n in enumerate(stats.step_tokens) if n] == [0, 2]  # up to 1, up to 4


def test_rates_are_those_of_the_latest_update(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with(1)
    now = 100.0
    monkeypatch.setattr("multilora.engine.stats.monotonic", lambda: now)
    engine.report.stats_update()
    run(engine, 1)
    now += 4.0
    stats = engine.report.stats_update()
    assert (stats.gen_throughput, stats.cache_hit_rate) == (0.5, 0.0)
    now += 60.0
    assert engine.report.stats_update().gen_throughput == 0.5  # nothing has happened since
