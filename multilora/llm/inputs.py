"""What the Python doors take in its many forms, as jobs for the front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multilora.errors import BadRequest
from multilora.front.adapter_spec import parse_specs
from multilora.front.classification import CLASSIFY
from multilora.front.embedding import READ_ONLY, check_dimensions, check_method, embedding_job
from multilora.front.generation import Job, Sample
from multilora.front.prompt import read_prompts, spread
from multilora.llm.embedding import TextEmbedding
from multilora.lora_path import LoraPath
from multilora.params import EmbeddingSettings, SamplingParams

if TYPE_CHECKING:
    import torch

Params = SamplingParams | dict[str, Any] | None
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def read_jobs(
    prompts: Prompts,
    sampling_params: Params | Sequence[Params],
    lora_path: Any,
    *,
    return_logprob: bool,
    logprob_start_len: int,
    top_logprobs_num: int,
) -> tuple[list[Job], bool]:
    """One job per prompt, and whether several prompts were given. Raises BadRequest."""
    given, several = read_prompts(prompts, "prompts")
    params = [_read_params(value) for value in spread(sampling_params, len(given), "sampling_params")]
    jobs = [
        Job(
            prompt=prompt,
            sampling=sampling,
            adapters=spec,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
        )
        for prompt, sampling, spec in zip(given, params, parse_specs(lora_path, len(given)), strict=True)
    ]
    return jobs, several


@dataclass(frozen=True)
class EmbeddingRequest:
    """What `embed` was asked for. several: whether a list of prompts was given."""

    jobs: list[Job]
    several: bool
    dimensions: int | None
    normalize: bool

    @classmethod
    def read(
        cls,
        prompts: Prompts,
        lora_path: Any,
        settings: EmbeddingSettings,
        *,
        dimensions: int | None,
        normalize: bool | None,
        pooling: str | None,
    ) -> "EmbeddingRequest":
        """settings: the model's. Raises BadRequest."""
        method, size = check_method(pooling, "pooling"), check_dimensions(dimensions, settings.size)
        given, several = read_prompts(prompts, "prompts")
        specs = parse_specs(lora_path, len(given))
        jobs = [embedding_job(prompt, settings, method, adapters=s) for prompt, s in zip(given, specs, strict=True)]
        return cls(jobs, several, size, settings.normalize if normalize is None else normalize)

    def answer(self, samples: Sequence[Sample]) -> "TextEmbedding | list[TextEmbedding]":
        """From the samples of the jobs, ended."""
        found = [TextEmbedding.of(sample, self.dimensions, normalize=self.normalize) for sample in samples]
        return found if self.several else found[0]


def classify_jobs(prompts: Prompts, lora_path: Any) -> tuple[list[Job], bool]:
    """One job per prompt, and whether several prompts were given. Raises BadRequest."""
    given, several = read_prompts(prompts, "prompts")
    specs = parse_specs(lora_path, len(given))
    jobs = [
        Job(prompt=p, sampling=READ_ONLY, pooling=CLASSIFY, adapters=s) for p, s in zip(given, specs, strict=True)
    ]
    return jobs, several


def names_of(jobs: Sequence[Job]) -> list[str]:
    """The names of the jobs' adapters, each once."""
    return list(dict.fromkeys(name for job in jobs for name, _ in job.adapters))


def _read_params(value: Params) -> SamplingParams:
    if isinstance(value, SamplingParams):
        value.check()
        return value
    return SamplingParams.parse(value)


def read_lora_paths(paths: Mapping[str, str]) -> list[LoraPath]:
    """Name → directory, hub repository or URL."""
    return [LoraPath(name, path) for name, path in paths.items()]


def write_tensors(tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    """As a .safetensors file; views and other layouts are copied first. Raises BadRequest for what is no tensor."""
    from safetensors.torch import save

    try:
        data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    except (AttributeError, TypeError, ValueError, RuntimeError) as e:  # no tensor, or one that is sparse, meta, …
        raise BadRequest(f"tensors: cannot be written as a .safetensors file: {e}", param="tensors") from e
    path.write_bytes(data)
