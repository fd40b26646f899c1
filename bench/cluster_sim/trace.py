"""What clients ask for: arrivals, which adapter, how long prompts and answers are. Made in advance, from a seed."""

from dataclasses import dataclass

import numpy as np

RANKS = (8, 16, 32, 64)  # of adapters, in turns


@dataclass(frozen=True)
class Traffic:
    """rate: requests a second, in the mean. zipf: exponent of the adapters' popularity. drift: what part of the
    adapters change places in the order of popularity each minute. diurnal: amplitude of the rate, 0 to 1, over one
    `period` in seconds. prompt, answer: means, in tokens."""

    adapters: int = 10_000
    rate: float = 10.0
    seconds: float = 60.0
    zipf: float = 1.0
    drift: float = 0.0
    diurnal: float = 0.0
    period: float = 120.0
    prompt: int = 512
    answer: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """adapter: its number; prompt, answer: tokens."""

    time: float
    adapter: int
    prompt: int
    answer: int


def rank_of(adapter: int) -> int:
    return RANKS[adapter % len(RANKS)]


def arrivals(traffic: Traffic) -> list[Arrival]:
    """In order of time."""
    rng = np.random.default_rng(traffic.seed)
    times = _times(traffic, rng)
    adapters = _adapters(traffic, times, rng)
    prompts = _lengths(rng, traffic.prompt, len(times), 4096)
    answers = _lengths(rng, traffic.answer, len(times), 1024)
    rows = zip(times.tolist(), adapters.tolist(), prompts.tolist(), answers.tolist(), strict=True)
    return [Arrival(*row) for row in rows]


def _times(traffic: Traffic, rng: np.random.Generator) -> np.ndarray:
    """A Poisson process whose rate swings: points of the highest rate, of which some are dropped."""
    highest = traffic.rate * (1 + traffic.diurnal)
    times = np.sort(rng.uniform(0, traffic.seconds, rng.poisson(highest * traffic.seconds)))
    rate = traffic.rate * (1 + traffic.diurnal * np.sin(2 * np.pi * times / traffic.period))
    kept: np.ndarray = times[rng.uniform(0, highest, len(times)) < rate]
    return kept


def _adapters(traffic: Traffic, times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    places, order = _places(traffic, len(times), rng), _order(traffic)
    chosen = np.empty_like(places)
    for minute in range(int(traffic.seconds // 60) + 1):
        now = (times // 60).astype(int) == minute
        chosen[now] = order[places[now]]
        moved = rng.choice(traffic.adapters, int(traffic.drift * traffic.adapters), replace=False)
        order[moved] = order[rng.permutation(moved)]
    return chosen


def history(traffic: Traffic, count: int) -> list[int]:
    """Adapters of so many requests that came before, by the popularity that there is at the start."""
    rng = np.random.default_rng([traffic.seed, 2])
    adapters: list[int] = _order(traffic)[_places(traffic, count, rng)].tolist()
    return adapters


def _places(traffic: Traffic, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places in the order of popularity."""
    weights = 1 / np.arange(1, traffic.adapters + 1) ** traffic.zipf
    places: np.ndarray = rng.choice(traffic.adapters, count, p=weights / weights.sum())
    return places


def _order(traffic: Traffic) -> np.ndarray:
    """Adapters by popularity, at the start."""
    return np.random.default_rng([traffic.seed, 1]).permutation(traffic.adapters)


def _lengths(rng: np.random.Generator, mean: int, count: int, most: int) -> np.ndarray:
    sigma = 0.8
    lengths = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    clipped: np.ndarray = np.clip(lengths, 4, most).astype(int)
    return clipped
