"""Random choices that keep training and held-out examples apart. Knows no corpus."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

SPLITS = ("train", "values", "templates")
EVERY = 5  # of the values of a list, each fifth is held out
TRIES = 200  # for one example that was not there before


def words(text: str, separator: str | None = None) -> list[str]:
    """The words of a list that is written over several lines."""
    return [word.strip() for word in text.replace("\n", " ").split(separator)]


@dataclass(frozen=True)
class Example:
    """What a user says and what the adapter answers; `check` is what the metric of this corpus needs beside that."""

    prompt: str
    answer: str
    check: dict[str, Any] = field(default_factory=dict)


class Draw:
    """A source of random choices for one split."""

    def __init__(self, split: str, rng: random.Random):
        self.split = split
        self.rng = rng

    def value(self, values: Sequence[T]) -> T:
        """One of the values of this split: each fifth of the list is held out, and only those are drawn then."""
        held_out = [values[i] for i in range(len(values)) if i % EVERY == EVERY - 1]
        trained = [values[i] for i in range(len(values)) if i % EVERY != EVERY - 1]
        return self.rng.choice(trained if self.split == "train" or not held_out else held_out)

    def any(self, values: Sequence[T]) -> T:
        """One of the values, whatever the split: words that have to be learnt before they can be used."""
        return self.rng.choice(values)

    def template(self, trained: Sequence[T], held_out: Sequence[T]) -> T:
        """One of the templates of this split."""
        return self.rng.choice(held_out if self.split == "templates" else trained)

    def mine(self, text: str) -> bool:
        """Whether a combination of known words belongs to this split: a tenth of all combinations is held out."""
        held_out = hashlib.sha256(text.encode()).digest()[0] < 26
        return held_out == (self.split == "values") or self.split == "templates"


def drawn(make: Callable[[Draw], Example], name: str, split: str, count: int) -> list[Example]:
    """Up to `count` different examples, fewer if a corpus has no more. A held-out prompt comes only once."""
    draw = Draw(split, random.Random(f"{name} {split}"))
    found: dict[tuple[str, str], Example] = {}
    misses = 0
    while len(found) < count and misses < TRIES:
        example = make(draw)
        key = (example.prompt, example.answer if split == "train" else "")
        misses = misses + 1 if key in found else 0
        found.setdefault(key, example)
    return list(found.values())
