"""Which idle adapter is evicted from the device first. Adding a policy is a function and a line in the table."""

from collections.abc import Callable
from typing import Protocol


class Candidate(Protocol):
    """What a policy may look at. Counters rise monotonically; the adapter with the smallest key is the victim."""

    last_used: int
    loaded_at: int
    score: float


def lru(candidate: Candidate) -> float:
    """The one whose last use lies furthest back."""
    return candidate.last_used


def fifo(candidate: Candidate) -> float:
    """The one that has been on the device the longest."""
    return candidate.loaded_at


def cost(candidate: Candidate) -> float:
    """The one with the lowest GreedyDual-Size-Frequency score (see memory/reclaim.py)."""
    return candidate.score


EVICTION_POLICIES: dict[str, Callable[[Candidate], float]] = {"lru": lru, "fifo": fifo, "cost": cost}
