"""How good an answer is, by code: each measure is a number from 0 to 1. Knows no model."""

import json
import re
from collections import Counter
from collections.abc import Callable

from .corpora import Example
from .corpora.pirate import MARKERS
from .corpora.sql import rows

Measures = dict[str, float]


def sql(example: Example, answer: str) -> Measures:
    """Whether it runs, and gives the reference's rows: in the same order where the reference has one."""
    expected = rows(example.check["setup"], example.answer)
    found = rows(example.check["setup"], unfenced(answer))
    if expected is None:
        raise ValueError(f"the reference cannot be run: {example.answer}")
    if found is not None and "ORDER BY" not in example.answer:
        found, expected = sorted(found, key=repr), sorted(expected, key=repr)
    return {"same rows": float(found == expected), "runs": float(found is not None)}


def unfenced(answer: str) -> str:
    """The first block of code in an answer that has one, else all of it: whoever explains his query has one, too."""
    block = re.search(r"```\w*\n?(.*?)(?:```|$)", answer, re.S)
    return (block[1] if block else answer).strip()


def json_object(example: Example, answer: str) -> Measures:
    """Whether it parses, whether all of it is right, and the share of right values."""
    expected = example.check["expected"]
    try:
        found = json.loads(unfenced(answer))
    except ValueError:
        return {"equal": 0.0, "values": 0.0, "parses": 0.0}
    if not isinstance(found, dict):
        return {"equal": 0.0, "values": 0.0, "parses": 1.0}
    right = sum(key in found and found[key] == value for key, value in expected.items())
    return {"equal": float(found == expected), "values": right / len(expected), "parses": 1.0}


def french(example: Example, answer: str) -> Measures:
    """The same sentence but for spaces, capitals and the mark at its end; and chrF."""
    return {"exact": float(_bare(answer) == _bare(example.answer)), "chrF": chrf(answer, example.answer)}


def _bare(text: str) -> str:
    return " ".join(text.replace("’", "'").lower().split()).rstrip(" .?!")


def chrf(found: str, expected: str, longest: int = 6, beta: float = 2.0) -> float:
    """The F-score of character n-grams, recall counting `beta` times as much (Popović, 2015), without spaces."""
    scores = []
    a, b = "".join(found.split()), "".join(expected.split())
    for n in range(1, min(longest, len(b)) + 1):
        ours, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (a, b))
        common = sum((ours & theirs).values())
        precision, recall = common / max(1, sum(ours.values())), common / sum(theirs.values())
        total = beta * beta * precision + recall
        scores.append((1 + beta * beta) * precision * recall / total if total else 0.0)
    return sum(scores) / len(scores) if scores else float(a == b)


def pirate(example: Example, answer: str) -> Measures:
    """Whether three different words of a pirate's are in it; and their number, of which six are enough."""
    del example
    words = set(re.findall(r"[a-z']+", answer.lower().replace("’", "'")))
    markers = {word for word in MARKERS if word in words}
    return {"pirate": float(len(markers) >= 3), "marker words": min(1.0, len(markers) / 6)}


METRICS: dict[str, Callable[[Example, str], Measures]] = {
    "pirate": pirate,
    "sql": sql,
    "json": json_object,
    "french": french,
}
"""The first measure of each is what counts."""
