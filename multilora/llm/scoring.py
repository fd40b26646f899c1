"""What the Python doors answer with to `score` and `rerank`, and what they read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from multilora.errors import BadRequest
from multilora.front.adapter_spec import parse_specs
from multilora.front.effects import Steps
from multilora.front.embedding import READ_ONLY
from multilora.front.front import Front
from multilora.front.generation import Job
from multilora.front.scoring import Scoring, TextPairs, ranking, scoring_of


@dataclass(frozen=True)
class RankedText:
    """One text of `rerank`. index: its place in the list that was given; score: how well it answers the query."""

    index: int
    score: float
    text: str


def read_scoring(front: Front, first: Any, second: Any, lora_path: Any, params: tuple[str, str]) -> Steps[Scoring]:
    """Texts, or lists of them; their adapter's head decides how they are compared, so it is loaded first. Raises
    BadRequest."""
    [spec] = parse_specs(lora_path, 1)
    pairs = TextPairs(_texts(first, params[0]), _texts(second, params[1]), params)
    held = yield from front.resolver.hold([name for name, _ in spec])
    try:
        return scoring_of(front, pairs, spec, None, Job(prompt=[], sampling=READ_ONLY))
    finally:
        front.resolver.release(held)


def _texts(given: Any, param: str) -> list[str]:
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise BadRequest(f"{param}: must be a text or a list of texts", param=param)
    return list(found)


def ranked(scores: Sequence[float], texts: Sequence[str], most: int | None) -> list[RankedText]:
    """The best first, of equal ones those that were given first."""
    return [RankedText(i, scores[i], texts[i]) for i in ranking(scores)[:most]]
