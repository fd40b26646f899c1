"""Workloads in which requests compete: for tests and for `bench.tenants`. Knows nothing of engines.

`trace`: one greedy tenant floods a server that nine modest ones use. The greedy tenant asks for 31 adapters in turn,
each modest one for an adapter of its own. `turns`: adapters that have to take turns. All arrive as Poisson processes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

GREEDY = "greedy"
MODEST = tuple(f"modest-{i}" for i in range(1, 10))
ADAPTERS = 40
GREEDY_ADAPTERS = ADAPTERS - len(MODEST)


@dataclass(frozen=True)
class Arrival:
    """One request. seconds: when it comes, from the start; adapter: 0 to 39."""

    seconds: float
    tenant: str
    adapter: int
    prompt: int  # tokens
    answer: int  # tokens

    @property
    def greedy(self) -> bool:
        return self.tenant == GREEDY


def trace(
    seconds: float, greedy_rate: float, modest_rate: float, *, prompt: int = 128, answer: int = 64, seed: int = 0
) -> list[Arrival]:
    """Arrivals of so many seconds, by time. greedy_rate: requests a second; modest_rate: of each modest tenant.
    prompt, answer: mean tokens; they are uniform between half and one and a half of it."""
    rng = random.Random(seed)
    found = []
    for number, tenant in enumerate((GREEDY, *MODEST)):
        now, count = rng.expovariate(rate := modest_rate if number else greedy_rate), 0
        while now < seconds:
            adapter = GREEDY_ADAPTERS + number - 1 if number else count % GREEDY_ADAPTERS
            sizes = (rng.randint(mean // 2, mean * 3 // 2) for mean in (prompt, answer))
            found.append(Arrival(now, tenant, adapter, *sizes))
            now, count = now + rng.expovariate(rate), count + 1
    return sorted(found, key=lambda arrival: arrival.seconds)


def modest_only(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """The same trace without the greedy tenant: what the modest ones get from an unloaded server."""
    return [arrival for arrival in arrivals if not arrival.greedy]


def turns(count: int, rate: float, adapters: int, *, prompt: int, answer: int, seed: int = 0) -> list[Arrival]:
    """`count` requests, `rate` a second, each of one of the first `adapters` adapters and of that one's own tenant.
    prompt, answer: tokens, the same for all."""
    rng = random.Random(seed)
    now, found = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        adapter = rng.randrange(adapters)
        found.append(Arrival(now, f"tenant-{adapter}", adapter, prompt, answer))
    return found


def p99(values: Sequence[float]) -> float:
    """The 99th percentile: the smallest value that 99 % of them do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -(-99 * len(ranked) // 100) - 1)]
