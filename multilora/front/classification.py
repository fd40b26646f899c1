"""Which head a request goes through, and what the numbers that come back mean: labels and probabilities.

Pure functions; raise BadRequest. The rules are those of transformers: of its classification models for the token
that is classified by, of its pipeline for what scores become.
"""

from dataclasses import dataclass

import numpy as np

from multilora.engine.messages import Ready
from multilora.errors import BadRequest
from multilora.front.adapter_ref import Held
from multilora.front.embedding import Vector, row_of
from multilora.front.generation import Job, Sample
from multilora.params import ClassifierSettings, PoolingParams

CLASSIFY = PoolingParams("last", scores=True)


def own_labels(held: Held) -> int:
    """How many labels the adapter's own head has; 0: it has none, or there is no adapter."""
    infos = [ref.info for ref in held.refs]
    return infos[0].num_labels if len(infos) == 1 and infos[0] is not None else 0


def num_labels(held: Held, ready: Ready) -> int:
    """How many labels a request is classified by; 0: neither its adapter nor the base model has such a head."""
    return own_labels(held) or (len(ready.classifier.labels) if ready.classifier else 0)


def check_head(job: Job, held: Held, ready: Ready) -> None:
    """Raise BadRequest unless the model has the head that the job needs."""
    if job.pooling is None and not ready.generates:
        kind = "it is a classifier" if ready.classifier else "it is a decoder alone"
        raise BadRequest(
            f"the base model has no language-model head, {kind}: it generates nothing; embeddings and, where base or "
            "adapter have a classification head, /classify, /v1/score and /v1/rerank are served",
            param="model",
        )
    if job.pooling is not None and job.pooling.scores and not num_labels(held, ready):
        names = ", ".join(ref.name for ref in held.refs)
        whose = f"neither the base model nor {names} has one" if names else "the base model has none"
        raise BadRequest(
            f"classification needs a classification head, and {whose}: name an adapter that was trained with "
            "task_type SEQ_CLS",
            param="model",
        )


def classified_tokens(ids: list[int], pad: int | None) -> list[int]:
    """The tokens up to the one that a text is classified by: the last that is no padding. What follows it is read by
    nobody."""
    if pad is None:
        return ids
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:1] if set(ids[:end]) == {pad} else ids[:end]


@dataclass(frozen=True)
class Classification:
    """label: of the largest score. scores: of the head, fp32; probabilities: what transformers' pipeline makes of
    them."""

    label: str
    scores: Vector
    probabilities: Vector


def classification_of(sample: Sample, settings: ClassifierSettings | None) -> Classification:
    """The scores of a sample that has ended well. settings: the base model's."""
    scores = row_of(sample)
    names = settings.labels if settings is not None and len(settings.labels) == len(scores) else ()
    best = int(np.argmax(scores))
    label = names[best] if names else f"LABEL_{best}"
    return Classification(label, scores, probabilities(scores, settings.problem_type if settings else ""))


def probabilities(scores: Vector, problem_type: str) -> Vector:
    """scores: fp32 [labels]. A regression's are the scores themselves."""
    if problem_type == "regression":
        return scores
    if problem_type == "multi_label_classification" or len(scores) == 1:
        return sigmoid(scores)
    shifted = np.exp(scores - scores.max())
    found: Vector = (shifted / shifted.sum()).astype(np.float32)
    return found


def sigmoid(scores: Vector) -> Vector:
    """1 / (1 + exp(-score)), without overflow."""
    small = np.exp(-np.abs(scores))
    found: Vector = np.where(scores >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
    return found
