"""What the Python doors answer with to `embed`."""

from dataclasses import dataclass

from multilora.front.embedding import vector_of
from multilora.front.generation import Sample
from multilora.front.versions import DEFAULT_WEIGHT_VERSION


@dataclass(frozen=True)
class TextEmbedding:
    """The vector of one prompt. lora_version, weight_version: which weights made it, see `front/versions.py`."""

    embedding: list[float]
    prompt_tokens: int
    cached_tokens: int
    lora_version: int | None = None
    weight_version: str = DEFAULT_WEIGHT_VERSION

    @classmethod
    def of(cls, sample: Sample, dimensions: int | None, *, normalize: bool) -> "TextEmbedding":
        """The embedding of a sample that has ended well."""
        label = sample.label
        return cls(
            embedding=vector_of(sample, dimensions, normalize=normalize).tolist(),
            prompt_tokens=len(sample.prompt_ids),
            cached_tokens=sample.stream.cached_tokens,
            lora_version=label.lora_version,
            weight_version=label.weight_version,
        )
