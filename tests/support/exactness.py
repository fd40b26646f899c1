"""How exact answers are. transformers + PEFT say what is right, in fp32, and what rounding may cost, in bf16.

A model is judged on the tokens that the engine chose, so that one early token that fell the other way is no error.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fakes.engine_driver import Answer, EngineDriver

SLACK = 1.25  # of two equally good ways to round, one may err by so much more than the other

Answers = Iterable[tuple[list[int], torch.Tensor]]
"""Each with its prompt in front, and what the engine says are the logprobs of its last tokens: [tokens], of those
tokens, or [tokens, vocab], of all."""


@dataclass(frozen=True)
class Judged:
    """What logprobs err: the engine's, those of transformers + PEFT in bf16, the engine's worst answer's."""

    error: float
    theirs: float
    worst: float


def judge(models: Mapping[Any, Any], answers: Mapping[Any, Answers], device: str, dtype: torch.dtype) -> Judged:
    """models: of transformers and PEFT in fp32, by adapter. answers: of the engine, by adapter."""
    mine, theirs = [], []
    for name, answered in answers.items():
        twin = copy.deepcopy(models[name]).to(dtype)
        for sequence, found in answered:
            exact = last(models[name], sequence, found, device)
            mine.append(found - exact)
            theirs.append(last(twin, sequence, found, device) - exact)
    return Judged(size(torch.cat(mine)), size(torch.cat(theirs)), max(size(errors) for errors in mine))


def last(model: Any, sequence: list[int], like: torch.Tensor, device: str) -> torch.Tensor:
    """The logprobs that `like` holds, as the model has them."""
    ids = torch.tensor([sequence], device=device)
    with torch.inference_mode():
        logits = model.to(device)(input_ids=ids).logits[0, -len(like) - 1 : -1]
    logprobs = logits.float().log_softmax(-1)
    return (logprobs if like.ndim == 2 else logprobs.gather(1, ids[0, -len(like) :, None])[:, 0]).cpu()


def size(errors: torch.Tensor) -> float:
    """Root mean square over tokens [tokens]. Of whole distributions [tokens, vocab] the geometric mean over tokens of
    each one's root mean square: the few where the model magnifies what rounding did to it do not decide."""
    if errors.ndim == 1:
        return float(errors.square().mean().sqrt())
    return float(errors.square().mean(1).sqrt().log().mean().exp())


def ask_for_all(driver: EngineDriver, prompt: list[int], adapter: str | None, *, vocab: int, **sampling: Any) -> str:
    """Submit for all logprobs of all positions."""
    return driver.submit(
        prompt, adapter, return_logprob=True, logprob_start_len=0, top_logprobs_num=vocab, **sampling
    )


def told(answer: Answer, vocab: int) -> torch.Tensor:
    """What was asked for so, [tokens, vocab], of all tokens but the first."""
    tops = (answer.input_top_logprobs or [])[1:] + answer.top_logprobs
    found = torch.empty(len(tops), vocab)
    for row, top in zip(found, tops, strict=True):
        values, ids = zip(*top, strict=True)
        row[torch.tensor(ids)] = torch.tensor(values)
    return found
