"""Requests through a scheduler like the engine's, on a clock that the step-cost model moves: continuous batching,
chunked prefill, adapters that are copied in, stay while there is room, and give way to others.

It differs from the engine's in three things: a request's pages are all taken when it starts, adapters give way by
least recent use, and no prefix is shared. As there, a step is planned while the one before it runs, so what arrives
during a step waits for another one. Called by `planner.py`.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from multilora.planner.step_model import StepLoad

Cost = Callable[[StepLoad], float]
"""Seconds of a step."""


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds, its tokens, and its adapter's number (None: the base model)."""

    at: float
    prompt: int
    answer: int
    adapter: int | None


@dataclass(frozen=True)
class Adapters:
    """All adapters of a workload. ranks: of adapter i, ranks[i % len(ranks)]; nbytes: what a step reads for a rank;
    pages: of a rank in the arena; copy_seconds: from host to device, for a rank."""

    ranks: Sequence[int]
    nbytes: Callable[[int], int]
    pages: Callable[[int], int]
    copy_seconds: Callable[[int], float]

    def rank(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]


@dataclass(frozen=True)
class SimulatedLimits:
    """pages: of the arena; pages_for: those of a text of so many tokens; adapter_pages: the most of them for adapters
    (None: all)."""

    running: int
    chunk_tokens: int
    pages: int
    pages_for: Callable[[int], int]
    adapter_pages: int | None = None


@dataclass
class Simulated:
    """What came out. first: seconds from arrival to first token, in the order of the tokens; step_seconds: of every
    step; steps: what they were, if they are kept."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    loads: int = 0
    widest: int = 0  # most requests in a step
    step_seconds: list[float] = field(default_factory=list)
    steps: list[StepLoad] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def first_token(self, quantile: float) -> float:
        """Seconds; 0 if there was none."""
        return quantile_of(self.first, quantile)


def quantile_of(values: Sequence[float], quantile: float) -> float:
    """The value below which this part of them lies; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0.0


class RequestDoesNotFitError(Exception):
    """A request does not fit the arena, alone with its adapter."""


@dataclass(eq=False)
class _Running:
    arrival: Arrival
    left: int  # prompt tokens
    made: int = 0


class _Residents:
    """Which adapters are on the device, by least recent use, and when those on their way will be."""

    def __init__(self, adapters: Adapters, limits: SimulatedLimits):
        self._adapters = adapters
        self._most = limits.pages if limits.adapter_pages is None else limits.adapter_pages
        self.ready_at: OrderedDict[int, float] = OrderedDict()
        self.users: dict[int, int] = {}
        self.pages = 0
        self.loads = 0
        self._link_free = 0.0

    def want(self, adapter: int, now: float, spare: int) -> bool | None:
        """Have it brought in. True: it is there; False: it is coming; None: there is no room. spare: free pages."""
        if adapter in self.ready_at:
            self.ready_at.move_to_end(adapter)
            return self.ready_at[adapter] <= now
        rank = self._adapters.rank(adapter)
        need = self._adapters.pages(rank)
        while self.pages + need > self._most or need > spare:
            idle = next((a for a in self.ready_at if not self.users.get(a) and self.ready_at[a] <= now), None)
            if idle is None:
                return None
            spare += self.evict(idle)
        self.pages += need
        self._link_free = max(self._link_free, now) + self._adapters.copy_seconds(rank)
        self.ready_at[adapter] = self._link_free
        self.loads += 1
        return self._link_free <= now

    def evict(self, adapter: int) -> int:
        """Returns the pages that it had."""
        pages = self._adapters.pages(self._adapters.rank(adapter))
        del self.ready_at[adapter]
        self.pages -= pages
        return pages

    def make_room(self, need: int, spare: int, now: float) -> bool:
        """Evict idle adapters until `need` pages are free."""
        while spare < need:
            idle = next((a for a in self.ready_at if not self.users.get(a) and self.ready_at[a] <= now), None)
            if idle is None:
                return False
            spare += self.evict(idle)
        return True

    def next_ready(self, now: float) -> float | None:
        return min((at for at in self.ready_at.values() if at > now), default=None)


BRING_IN = 32  # as the engine's admission: the first so many waiting have their adapters brought in
WINDOW = 256  # the first so many may start before others, if their adapter is there


class Simulation:
    """One run. `cost` says how long a step takes; keep: remember every step. `run` raises RequestDoesNotFitError."""

    def __init__(self, cost: Cost, adapters: Adapters, limits: SimulatedLimits, *, keep: bool = False):
        self._cost = cost
        self._adapters = adapters
        self._limits = limits
        self._keep = keep
        self._residents = _Residents(adapters, limits)
        self._running: list[_Running] = []
        self._waiting: deque[Arrival] = deque()
        self._kv_pages = 0
        self._now = 0.0
        self._planned_at = 0.0  # when the next step's plan is made: at the start of the one that runs
        self.result = Simulated()

    def run(self, arrivals: Iterable[Arrival]) -> Simulated:
        """Serve them all. arrivals: by time."""
        coming = deque(arrivals)
        while coming or self._waiting or self._running:
            seen = self._planned_at if self._running else self._now
            while coming and coming[0].at <= seen:
                self._waiting.append(coming.popleft())
            chunks = self._plan()
            if chunks:
                self._step(chunks)
                continue
            waits = [at for at in (self._residents.next_ready(self._now),) if at is not None]
            waits += [coming[0].at] if coming else []
            if not waits:
                raise RequestDoesNotFitError
            self._now = self._planned_at = max(self._now, min(waits))
        self.result.seconds, self.result.loads = self._now, self._residents.loads
        return self.result

    def _plan(self) -> list[tuple[_Running, int]]:
        chunks = [(r, 1) for r in self._running if not r.left]
        budget = self._limits.chunk_tokens
        for request in self._running:
            if request.left and budget:
                count = min(budget, request.left)
                chunks.append((request, count))
                budget -= count
        held: list[Arrival] = []
        for looked in range(min(WINDOW, len(self._waiting))):
            if not budget or len(self._running) >= self._limits.running:
                break
            arrival = self._waiting.popleft()
            started = self._start(arrival, bring_in=looked < BRING_IN)
            if not started:
                held.append(arrival)
                if started is None:
                    break
                continue
            request = self._running[-1]
            count = min(budget, request.left)
            chunks.append((request, count))
            budget -= count
        self._waiting.extendleft(reversed(held))
        return chunks

    def _start(self, arrival: Arrival, *, bring_in: bool) -> bool | None:
        """False: its adapter is not there; None: there are no pages, so that nobody else starts either."""
        if not bring_in and arrival.adapter is not None and arrival.adapter not in self._residents.ready_at:
            return False
        pages = self._pages(arrival)
        spare = self._limits.pages - self._kv_pages - self._residents.pages
        if arrival.adapter is not None and not self._residents.want(arrival.adapter, self._now, spare - pages):
            return False
        spare = self._limits.pages - self._kv_pages - self._residents.pages
        if arrival.adapter is not None:
            self._residents.users[arrival.adapter] = self._residents.users.get(arrival.adapter, 0) + 1
        if not self._residents.make_room(pages, spare, self._now):
            if arrival.adapter is not None:
                self._residents.users[arrival.adapter] -= 1
            return None
        self._kv_pages += pages
        self._running.append(_Running(arrival, arrival.prompt))
        return True

    def _step(self, chunks: list[tuple[_Running, int]]) -> None:
        load = self._load(chunks)
        self._planned_at = self._now
        seconds = self._cost(load)
        self._now += seconds
        result = self.result
        result.step_seconds.append(seconds)
        result.widest = max(result.widest, len(chunks))
        if self._keep:
            result.steps.append(load)
        for request, count in chunks:
            if request.left:
                request.left -= count
                if request.left:
                    continue
                result.first.append(self._now - request.arrival.at)
            request.made += 1
            result.tokens += 1
            if request.made >= request.arrival.answer:
                self._end(request)

    def _end(self, request: _Running) -> None:
        self._running.remove(request)
        self._kv_pages -= self._pages(request.arrival)
        if request.arrival.adapter is not None:
            self._residents.users[request.arrival.adapter] -= 1

    def _load(self, chunks: list[tuple[_Running, int]]) -> StepLoad:
        decodes = prompt = context = prompt_context = adapted = ranks = 0
        distinct: set[int] = set()
        for request, count in chunks:
            adapter = request.arrival.adapter
            if request.left:
                prompt += count
                before = request.arrival.prompt - request.left
                prompt_context += count * before + count * count // 2
            else:
                decodes += 1
                context += request.arrival.prompt + request.made
            if adapter is not None:
                adapted += count
                distinct.add(adapter)
                ranks += count * self._adapters.rank(adapter) if request.left else 0
        nbytes = sum(self._adapters.nbytes(self._adapters.rank(adapter)) for adapter in distinct)
        return StepLoad(decodes, prompt, context, prompt_context, adapted, nbytes, ranks)

    def _pages(self, arrival: Arrival) -> int:
        return self._limits.pages_for(arrival.prompt + arrival.answer)


def poisson(
    rate: float, count: int, prompt: int, answer: int, adapters: int, *, skew: float = 0.0, seed: int = 0
) -> list[Arrival]:
    """`count` arrivals at random times, `rate` a second. skew: adapter i is asked for as 1 / (i + 1) ** skew."""
    rng = random.Random(seed)
    weights = [1 / (i + 1) ** skew for i in range(adapters)]
    asked = rng.choices(range(adapters), weights, k=count) if adapters else [None] * count
    found, now = [], 0.0
    for adapter in asked:
        now += rng.expovariate(rate)
        found.append(Arrival(now, prompt, answer, adapter))
    return found
