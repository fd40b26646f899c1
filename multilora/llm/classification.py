"""What the Python doors answer with to `classify`."""

from dataclasses import dataclass

from multilora.front.classification import classification_of
from multilora.front.generation import Sample
from multilora.front.versions import DEFAULT_WEIGHT_VERSION
from multilora.params import ClassifierSettings


@dataclass(frozen=True)
class TextClassification:
    """What one prompt was classified as. label: the likeliest one; probs: of each label, as transformers' pipeline
    computes them; scores: of each label, as the head gave them."""

    label: str
    probs: list[float]
    scores: list[float]
    prompt_tokens: int
    cached_tokens: int
    lora_version: int | None = None
    weight_version: str = DEFAULT_WEIGHT_VERSION

    @classmethod
    def of(cls, sample: Sample, settings: ClassifierSettings | None) -> "TextClassification":
        """The classes of a sample that has ended well; settings: the base model's."""
        found, label = classification_of(sample, settings), sample.label
        return cls(
            label=found.label,
            probs=found.probabilities.tolist(),
            scores=found.scores.tolist(),
            prompt_tokens=len(sample.prompt_ids),
            cached_tokens=sample.stream.cached_tokens,
            lora_version=label.lora_version,
            weight_version=label.weight_version,
        )
