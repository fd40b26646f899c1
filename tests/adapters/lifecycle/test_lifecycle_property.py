"""Random lives of many adapters: no move leaves the table, every pool's equation holds, the statistics add up."""

import random
from collections import Counter
from collections.abc import Callable
from typing import ClassVar

import pytest
from fakes.engine import make_engine
from fakes.tiers import PAGE_BYTES, FakeFile, FakeTiers

from multilora.adapters.lifecycle.components import Components
from multilora.adapters.lifecycle.store import Loaded, LoadStatus
from multilora.adapters.lifecycle.version import TRANSITIONS, AdapterVersion, State
from multilora.engine.adapter_stats import AdapterStatsTable
from multilora.errors import AdapterInvalid, ConfigError

SEEDS = 40
OPERATIONS = 300


class World:
    """Tiers that hold about a third of what is asked of them, and what uses them: requests as lists of versions."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.files = {f"/{i}": FakeFile(rank=8 * rng.randint(1, 3)) for i in range(8)}
        self.tiers = FakeTiers(
            self.files,
            total_pages=rng.choice([12, 16]),
            context_pages=1,
            max_loras_per_batch=rng.choice([None, 2, 4]),
            max_loaded_loras=rng.choice([None, 2, 4]),
            max_host_pages=rng.choice([None, 6, 10]),
            policy=rng.choice(["lru", "fifo", "cost"]),
            fetch_delay=lambda: rng.choice([0, 0, 2]),
            copy_delay=lambda: rng.choice([0, 0, 3]),
        )
        self.store = self.tiers.store
        engine = make_engine(self.tiers)
        self.components: Components = engine.scheduler.components
        self.report = engine.report
        self.table = AdapterStatsTable()
        self.fence = 0
        self.loading: set[int] = set()
        self.loaded: set[int] = set()
        self.waiting: list[list[int]] = []
        self.running: list[list[int]] = []
        self.kv: list[int] = []
        self.version = 0

    # ------------------------------------------------------------------ operations

    def load(self) -> None:
        self.version += 1
        path = self.rng.choice([*self.files, "/none"])
        self.store.load(self.version, path, self.rng.random() < 0.1)
        self.loading.add(self.version)

    def unload(self) -> None:
        used = {v for request in self.waiting + self.running for v in request}
        if idle := sorted(self.loaded - used):
            version = self.rng.choice(idle)
            self.store.unload(version, self.fence)
            self.loaded.remove(version)

    def poll(self) -> None:
        for event in self.store.poll_loads(self.fence):
            if isinstance(event, Loaded):
                self.loading.remove(event.version)
                self.loaded |= {event.version} if event.error is None else set()
            else:
                assert event.version in self.loaded

    def submit(self) -> None:
        if self.loaded:
            count = min(len(self.loaded), self.rng.choice([1, 1, 1, 2]))
            request = sorted(self.rng.sample(sorted(self.loaded), count))
            self.waiting.append(request)
            self.components.count_waiting(request, 1)
            self.components.count_demand(request, 1)

    def plan(self) -> None:
        self.components.begin_plan()
        for request in list(self.waiting):
            self.components.count_request(request)
            urgent = request is self.waiting[0] and self.rng.random() < 0.3
            found = self.components.request_load(request, self.fence, urgent=urgent)
            assert (found is LoadStatus.READY) == self.components.ready(request)
            self.check()
            if found is LoadStatus.READY and len(self.running) < 3:
                self.components.acquire_slots(request)
                self.leave_queue(request)
                self.running.append(request)
        self.fence += 1

    def leave_queue(self, request: list[int]) -> None:
        self.waiting.remove(request)
        self.components.count_waiting(request, -1)
        self.components.count_demand(request, -1)

    def finish(self) -> None:
        self.tiers.pool.complete(self.fence)
        if self.running:
            self.components.release_slots(self.running.pop(self.rng.randrange(len(self.running))))

    def give_up(self) -> None:
        if self.waiting:
            self.leave_queue(self.rng.choice(self.waiting))

    def break_or_mend_a_file(self) -> None:
        file = self.rng.choice(list(self.files.values()))
        file.error = None if file.error else self.rng.choice([None, AdapterInvalid("broken")])
        if self.rng.random() < 0.2:
            file.fingerprint = self.rng.choice(["as written", "other"])

    def change_limits(self) -> None:
        pages, count = self.rng.choice([None, 3, 8]), self.rng.choice([None, 1, 3])
        device_bytes = None if pages is None else pages * PAGE_BYTES
        before = (self.tiers.device.max_count, self.tiers.device.max_pages)
        try:
            self.store.set_limits(device_bytes=device_bytes, max_count=count, fence=self.fence)
        except ConfigError:
            assert (self.tiers.device.max_count, self.tiers.device.max_pages) == before

    def take_or_free_kv(self) -> None:
        if self.kv:
            self.tiers.pool.free_pages(self.kv, self.fence)
            self.kv = []
        elif self.tiers.reclaimer.ensure(3, self.fence):
            self.kv = self.tiers.pool.alloc_kv(3)

    def read_statistics(self) -> None:
        merged, whole = self.table.merge(self.report.stats_update()), self.report.stats()
        assert {a.version: a for a in merged.adapters} == {a.version: a for a in whole.adapters}
        assert len(merged.adapters) == len(whole.adapters)
        for requests, field in ((self.running, "running"), (self.waiting, "waiting")):
            found = {a.version: getattr(a, field) for a in merged.adapters if getattr(a, field)}
            assert found == Counter(version for request in requests for version in request)
        assert self.report.stats_update().adapters == [], "nothing has happened since"

    WEIGHTS: ClassVar[dict[Callable[["World"], None], int]] = {
        poll: 30, plan: 30, submit: 12, finish: 12, load: 8, unload: 4, give_up: 3, break_or_mend_a_file: 4,
        change_limits: 2, take_or_free_kv: 3, read_statistics: 5,
    }  # fmt: skip

    # ------------------------------------------------------------------ books

    def check(self) -> None:
        self.tiers.check()
        assert {a.version for a in self.store.loaded()} == self.loaded
        for request in self.running:
            assert all(
                self.tiers.weights_are(v, slot)
                for v, slot in zip(request, self.components.slots(request), strict=True)
            )
        for adapter in self.store.loaded():
            assert not adapter.pinned or adapter.state in (State.ON_HOST, State.LOADING, State.RESIDENT)

    def run(self) -> None:
        operations = self.rng.choices(list(self.WEIGHTS), list(self.WEIGHTS.values()), k=OPERATIONS)
        for operation in operations:
            operation(self)
            self.check()

    def drain(self) -> None:
        """Everything leaves, and nothing is left behind."""
        if self.kv:
            self.take_or_free_kv()
        for request in list(self.waiting):
            self.leave_queue(request)
        while self.running:
            self.finish()
        self.components.begin_plan()
        for _ in range(20):
            self.tiers.pool.complete(self.fence)
            self.poll()
        assert not self.loading and not self.store.busy
        while self.loaded:
            self.unload()
        for _ in range(10):
            self.poll()
        self.check()
        self.read_statistics()
        assert self.table.merge(self.report.stats_update()).adapters == []
        assert self.tiers.pool.free == self.tiers.pool.total
        assert len(self.tiers.host) == len(self.tiers.device) == len(self.tiers.table) == 0


def test_random_lives_make_every_move_of_the_table_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[State, State]] = set()
    move = AdapterVersion.move

    def recorded(adapter: AdapterVersion, state: State) -> None:
        seen.add((adapter.state, state))
        move(adapter, state)

    monkeypatch.setattr(AdapterVersion, "move", recorded)
    for seed in range(SEEDS):
        world = World(seed)
        world.run()
        world.drain()
    assert seen == TRANSITIONS.keys()
