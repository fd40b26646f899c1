"""How well two texts go together: a score for each pair, by one of two ways that the model and its adapter decide.

    cross-encoder   there is a classification head with one label: both texts are one prompt, as the tokenizer joins a
                    pair, and the head's score becomes a probability
    bi-encoder      there is none: the cosine of their embeddings, each text read once

Pure functions; raise BadRequest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from multilora.errors import BadRequest
from multilora.front.adapter_spec import AdapterSpec
from multilora.front.classification import CLASSIFY, classification_of
from multilora.front.embedding import READ_ONLY, Vector, row_of
from multilora.front.generation import Job, Sample
from multilora.front.prompt import MAX_PROMPTS, PairPrompt, TextPrompt, Truncation
from multilora.front.request_front import RequestFront
from multilora.params import PoolingParams


@dataclass(frozen=True)
class TextPairs:
    """Texts to be compared: each of `first` with that of `second` in the same place, or the only one with all.
    params: the client's fields that they came in."""

    first: Sequence[str]
    second: Sequence[str]
    params: tuple[str, str]

    def __post_init__(self) -> None:
        """Raises BadRequest unless the lengths fit."""
        for texts, param in zip((self.first, self.second), self.params, strict=True):
            if not texts:
                raise BadRequest(f"{param}: no texts, the list is empty", param=param)
            if len(texts) > MAX_PROMPTS:
                raise BadRequest(f"{param}: {len(texts)} texts, at most {MAX_PROMPTS} are taken", param=param)
        if len(self.first) not in (1, len(self.second)):
            what = f"{len(self.first)} texts for {len(self.second)} in {self.params[1]}: must be 1, or as many"
            raise BadRequest(f"{self.params[0]}: {what}", param=self.params[0])

    def of(self, index: int) -> int:
        """Which of `first` belongs to this one of `second`."""
        return index if len(self.first) > 1 else 0


@dataclass(frozen=True)
class Scoring:
    """What a request for scores asks of the engine. jobs: one for each pair of a cross-encoder; else one for each
    text, the first ones first."""

    pairs: TextPairs
    jobs: list[Job]
    crossed: bool

    def scores(self, samples: Sequence[Sample], front: RequestFront, *, raw: bool = False) -> list[float]:
        """One for each of `pairs.second`, from the samples, which have ended well. raw: as the head gave it."""
        if self.crossed:
            found = [classification_of(sample, front.engine.ready.classifier) for sample in samples]
            return [float((one.scores if raw else one.probabilities)[0]) for one in found]
        rows = [row_of(sample) for sample in samples]
        count = len(self.pairs.first)
        return [cosine(rows[self.pairs.of(i)], row) for i, row in enumerate(rows[count:])]


def scoring_of(
    front: RequestFront, pairs: TextPairs, spec: AdapterSpec, truncation: Truncation | None, common: Job
) -> Scoring:
    """common: the other fields of every job. Raises BadRequest for a head of several labels."""
    labels = _labels(front, spec)
    common = replace(common, sampling=READ_ONLY, adapters=spec)
    if labels > 1:
        raise BadRequest(
            f"scores of pairs need a classification head with one label, this one has {labels}: /classify serves it",
            param="model",
        )
    if labels:
        prompts = [
            PairPrompt(pairs.first[pairs.of(i)], text, pairs.params[1], truncation)
            for i, text in enumerate(pairs.second)
        ]
        return Scoring(pairs, [replace(common, prompt=prompt, pooling=CLASSIFY) for prompt in prompts], crossed=True)
    texts = [
        (text, param)
        for texts, param in zip((pairs.first, pairs.second), pairs.params, strict=True)
        for text in texts
    ]
    pooling = PoolingParams(front.engine.ready.embedding.method)
    jobs = [
        replace(common, prompt=TextPrompt(text, param, truncation=truncation), pooling=pooling)
        for text, param in texts
    ]
    return Scoring(pairs, jobs, crossed=False)


def _labels(front: RequestFront, spec: AdapterSpec) -> int:
    """How many labels the adapter's own head has, else the base model's; 0: there is none."""
    version = front.registry.sole_version(spec)
    info = None if version is None else front.registry.ref(version).info
    settings = front.engine.ready.classifier
    return (info.num_labels if info else 0) or (len(settings.labels) if settings else 0)


def cosine(one: Vector, other: Vector) -> float:
    """The cosine of the angle between two rows, from -1 to 1; 0 with a row of zeros."""
    wide, second = one.astype(np.float64), other.astype(np.float64)
    length = float(np.linalg.norm(wide) * np.linalg.norm(second))
    return float(wide @ second) / length if length else 0.0


def ranking(scores: Sequence[float]) -> list[int]:
    """Their places, the highest score first, and of equal ones the first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))
