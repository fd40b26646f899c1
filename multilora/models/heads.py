"""What a checkpoint has behind its decoder: a language-model head, a classification head, or nothing.

The decoder is that of transformers' causal LM of the same family in each case, so the classes of this package serve
all three; adapters bring classification heads of their own to any of them. Called by `load.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from multilora.errors import ModelUnsupported
from multilora.params import ClassifierSettings


@dataclass(frozen=True)
class HeadKind:
    """architecture: as config.json names it. decoder: the class of the same decoder under a language-model head."""

    architecture: str
    decoder: str
    generates: bool = True
    classifies: bool = False

    def as_decoder(self, raw: dict[str, Any]) -> dict[str, Any]:
        """A raw config.json as the causal LM of the same decoder has it."""
        return raw if self.generates else raw | {"architectures": [self.decoder]}


def head_kind(raw: dict[str, Any]) -> HeadKind:
    """By a raw config.json. What transformers knows of no causal LM is left to whoever reads it next."""
    names = raw.get("architectures") or []
    name, kind = str(names[0]) if len(names) == 1 else "", str(raw.get("model_type"))
    causal = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, kind)
    if not causal or name in causal:
        return HeadKind(name, name)
    if name in _names(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, kind):
        return HeadKind(name, causal[0], generates=False, classifies=True)
    if name in _names(MODEL_MAPPING_NAMES, kind):
        return HeadKind(name, causal[0], generates=False)
    return HeadKind(name, name)


def _names(mapping: dict[str, Any], kind: str) -> tuple[str, ...]:
    found = mapping.get(kind, ())
    return (found,) if isinstance(found, str) else tuple(found)


def classifier_settings(kind: HeadKind, hf: PretrainedConfig) -> ClassifierSettings | None:
    """What the config says of its classification head, if it has one. Raises ModelUnsupported for a head that is no
    matrix over the hidden row of a text's last token."""
    if not kind.classifies:
        return None
    _check_score(kind.architecture, hf)
    labels = tuple(str(hf.id2label.get(i, f"LABEL_{i}")) for i in range(hf.num_labels))
    return ClassifierSettings(labels=labels, problem_type=hf.problem_type or "")


def _check_score(architecture: str, hf: PretrainedConfig) -> None:
    cls = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(hf)]
    with torch.device("meta"):
        score = getattr(cls._from_config(hf), "score", None)
    if type(score) is not nn.Linear or score.bias is not None:
        what = "its classification head is not one matrix named score"
        raise ModelUnsupported(f"{architecture} is not supported: {what}")
