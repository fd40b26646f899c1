"""What the four adapters learn: examples drawn from templates and word lists, each a function of a seed.

    CORPORA[voice](draw) -> Example

A `Draw` gives training examples, or held-out ones of two kinds: known templates filled with values that training
never sees (`values`), and templates that training never sees (`templates`).
"""

from collections.abc import Callable

from . import french, json_notes, pirate, sql
from .draw import SPLITS, Draw, Example, drawn

__all__ = ["CORPORA", "SPLITS", "Draw", "Example", "drawn", "examples"]

CORPORA: dict[str, Callable[[Draw], Example]] = {
    "pirate": pirate.example,
    "sql": sql.example,
    "json": json_notes.example,
    "french": french.example,
}


def examples(voice: str, split: str, count: int) -> list[Example]:
    """The first `count` examples of a split, without repetitions of a prompt; always the same ones."""
    return drawn(CORPORA[voice], voice, split, count)
