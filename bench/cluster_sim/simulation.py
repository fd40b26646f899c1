"""Events in order of time: arrivals, steps, loads, reports, and replicas that die and come back."""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.cluster_sim.calibration import Calibration
from bench.cluster_sim.engine import Job, SimulatedEngine, Sizes
from bench.cluster_sim.routing import Routing
from bench.cluster_sim.trace import Arrival

HISTORY_REPORT = 200  # requests of the history for each replica, between two reports


@dataclass(frozen=True)
class Scenario:
    """warm: seconds at the start that are not counted. failures: replicas that die, one after the other, after that.
    report_seconds: between two reports of a replica. history: adapters of requests that were served one at a time
    before the clock starts, so that the tiers hold what they would after hours of this routing. shared_cores: how
    many times as long a step takes while one, two … engines compute; empty: each has cores of its own. way: seconds
    for which a request on its way to an engine computes as well, on those cores."""

    replicas: int = 100
    warm: float = 30.0
    failures: int = 0
    report_seconds: float = 1.0
    sizes: Sizes = field(default_factory=Sizes)
    ideal: bool = False
    seed: int = 0
    history: Sequence[int] = ()
    shared_cores: Sequence[float] = ()
    way: float = 0.0


@dataclass
class Measured:
    """Of the requests that came after the warm-up. first: seconds to the first token; hits: by tier;
    busy: engines that computed when each came, where they share cores."""

    first: list[float] = field(default_factory=list)
    hits: dict[str, int] = field(default_factory=lambda: {"device": 0, "host": 0, "": 0})
    seconds: list[float] = field(default_factory=list)
    retried: int = 0
    broken: int = 0  # a stream that had begun
    fetched: float = 0.0  # bytes that were read from files
    unfinished: int = 0
    busy: list[int] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Quantiles in milliseconds, rates as parts of one."""
        count = max(1, sum(self.hits.values()))
        p50, p90, p99 = (float(q) * 1e3 for q in np.quantile(self.first or [0.0], [0.5, 0.9, 0.99]))
        return {
            "requests": count,
            "first_token_p50_ms": round(p50, 1),
            "first_token_p90_ms": round(p90, 1),
            "first_token_p99_ms": round(p99, 1),
            "latency_p50_s": round(float(np.median(self.seconds or [0.0])), 3),
            "device_hit_rate": round(self.hits["device"] / count, 4),
            "hit_rate": round(1 - self.hits[""] / count, 4),
            "fetched_mb_per_request": round(self.fetched / 1e6 / count, 2),
            "retried": self.retried,
            "broken_streams": self.broken,
            "unfinished": self.unfinished,
        }


class Simulation:
    """One run. `run` returns what was measured."""

    def __init__(self, scenario: Scenario, calibration: Calibration, routing: Routing, arrivals: Sequence[Arrival]):
        self._scenario, self._calibration, self._routing = scenario, calibration, routing
        self._arrivals = arrivals
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._on_the_way = 0  # requests that compute beside the engines
        self._serial = 0
        self._random = random.Random(scenario.seed)
        self._measured = Measured()
        self._engines = {name: self._engine(name) for name in (f"r{i}" for i in range(scenario.replicas))}
        self._born = scenario.replicas
        self._dead: list[SimulatedEngine] = []
        self._fetched_before = 0.0
        self._end_times: list[float] = []
        routing.use(self._engines)

    def run(self) -> Measured:
        """To the last arrival and ten seconds more."""
        self._remember()
        scenario, end = self._scenario, self._arrivals[-1].time
        self._at(scenario.report_seconds, self._report)
        for i in range(scenario.failures):
            self._at(scenario.warm + (i + 0.5) * (end - scenario.warm) / scenario.failures, self._kill)
        self._at(self._arrivals[0].time, lambda now: self._arrive(0, now))
        self._at(scenario.warm, self._begin_counting)
        self._at(end, self._count_fetched)
        while self._events and self._events[0][0] <= end + 10:
            now, _, call = heapq.heappop(self._events)
            call(now)
        left = [job for engine in self._engines.values() for job in engine.jobs if job.sent >= scenario.warm]
        self._measured.unfinished = len(left)
        self._measured.first += [end + 10 - job.sent for job in left if job.first is None]
        return self._measured

    def _remember(self) -> None:
        between = max(20_000, HISTORY_REPORT * self._scenario.replicas)
        for number, adapter in enumerate(self._scenario.history):
            if number % between == 0:
                self._routing.report()
            name, owner = self._routing.choose(Arrival(0.0, adapter, 0, 0))
            self._engines[name].remember(adapter)
            self._routing.ended(name, owner)
        self._routing.report()

    def ended_before(self, time: float) -> int:
        """How many requests have ended between the warm-up and then."""
        return sum(self._scenario.warm <= end < time for end in self._end_times)

    def _at(self, time: float, call: Callable[[float], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (time, self._serial, call))

    def _engine(self, name: str) -> SimulatedEngine:
        scenario = self._scenario
        pace = self._pace if scenario.shared_cores else None
        return SimulatedEngine(
            name, scenario.sizes, self._calibration, self._at, self._first, self._ended, scenario.ideal, pace
        )

    def _pace(self) -> float:
        """How many times as long a step takes that another engine begins now."""
        times, others = self._scenario.shared_cores, self._computing() + self._on_the_way
        beyond = max(0, others - len(times) + 1)  # each more takes as much as the last that was measured
        more = times[-1] - times[-2] if len(times) > 1 else 0.0
        return times[min(others, len(times) - 1)] + beyond * more

    def _computing(self) -> int:
        return sum(engine.busy for engine in self._engines.values())

    def _arrive(self, number: int, now: float) -> None:
        self._send(self._arrivals[number], now, now)
        if number + 1 < len(self._arrivals):
            self._at(self._arrivals[number + 1].time, lambda time: self._arrive(number + 1, time))

    def _send(self, arrival: Arrival, sent: float, now: float) -> None:
        name, owner = self._routing.choose(arrival)
        job = self._engines[name].submit(arrival, sent, now, owner)
        if sent >= self._scenario.warm:
            self._measured.hits[job.hit] += 1
            if self._scenario.shared_cores:
                self._measured.busy.append(self._computing())
        if self._scenario.way:
            self._on_the_way += 1
            self._at(now + self._scenario.way, self._arrived)

    def _arrived(self, now: float) -> None:
        del now
        self._on_the_way -= 1

    def _first(self, job: Job, now: float) -> None:
        self._routing.prompt_read(job.replica, job.owner)
        if job.sent >= self._scenario.warm:
            self._measured.first.append(now - job.sent)

    def _ended(self, job: Job, now: float) -> None:
        self._routing.ended(job.replica, job.owner)
        self._end_times.append(now)
        if job.sent >= self._scenario.warm:
            self._measured.seconds.append(now - job.sent)

    def _report(self, now: float) -> None:
        self._routing.report()
        self._at(now + self._scenario.report_seconds, self._report)

    def _begin_counting(self, now: float) -> None:
        del now
        self._fetched_before = sum(engine.fetched for engine in self._engines.values())

    def _count_fetched(self, now: float) -> None:
        del now
        engines = (*self._engines.values(), *self._dead)
        self._measured.fetched = sum(engine.fetched for engine in engines) - self._fetched_before

    def _kill(self, now: float) -> None:
        """A replica dies; what had no token yet is sent elsewhere, another replica comes when it has started."""
        victim = self._engines.pop(self._random.choice(list(self._engines)))
        victim.dead = True
        self._dead.append(victim)
        self._routing.use(self._engines)
        for job in victim.jobs:
            if job.first is None:
                self._measured.retried += 1
                self._send(job.arrival, job.sent, now)
            else:
                self._measured.broken += 1
        self._at(now + self._calibration.start, self._come)

    def _come(self, now: float) -> None:
        del now
        name = f"r{self._born}"
        self._born += 1
        self._engines[name] = self._engine(name)
        self._routing.use(self._engines)
