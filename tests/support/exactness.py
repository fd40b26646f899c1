"""How exact answers in bf16 are. transformers + PEFT say what is right, in fp32, and what rounding costs, in bf16.

A model is judged on the tokens that the engine chose, so that one early token that fell the other way is no error.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

SLACK = 1.25  # of two equally good ways to round, one may err by so much more than the other


@dataclass(frozen=True)
class Judged:
    """Root mean squares of what logprobs err: the engine's, those of transformers + PEFT in bf16, and those of the
    engine's worst answer."""

    error: float
    theirs: float
    worst: float


def judge(
    models: Mapping[Any, Any],
    answers: Mapping[Any, Iterable[tuple[list[int], list[float]]]],
    device: str,
    dtype: torch.dtype,
) -> Judged:
    """models: of transformers and PEFT in fp32, by adapter. answers: to each adapter's prompts, as prompt and answer
    in one and the logprobs of the answer."""
    mine, theirs = [], []
    for name, answered in answers.items():
        found = [(torch.tensor([sequence]), torch.tensor(logprobs)) for sequence, logprobs in answered]
        exact = [chosen(models[name], sequence, len(logprobs), device) for sequence, logprobs in found]
        twin = copy.deepcopy(models[name]).to(dtype)
        rounded = [chosen(twin, sequence, len(logprobs), device) for sequence, logprobs in found]
        mine += [logprobs - e for (_, logprobs), e in zip(found, exact, strict=True)]
        theirs += [r - e for r, e in zip(rounded, exact, strict=True)]
    return Judged(rms(torch.cat(mine)), rms(torch.cat(theirs)), max(rms(errors) for errors in mine))


def chosen(model: Any, sequence: torch.Tensor, count: int, device: str) -> torch.Tensor:
    """Logprobs [count] of the last tokens of a sequence [1, tokens]."""
    return every(model, sequence, device)[-count:].gather(1, sequence[0, -count:, None])[:, 0]


def every(model: Any, sequence: torch.Tensor, device: str) -> torch.Tensor:
    """Logprobs [tokens - 1, vocab] of all tokens but the first of a sequence [1, tokens], on the CPU."""
    with torch.inference_mode():
        logits = model.to(device)(input_ids=sequence.to(device)).logits[0, :-1]
    return logits.float().log_softmax(-1).cpu()


def rms(errors: torch.Tensor) -> float:
    return float(errors.square().mean().sqrt())
