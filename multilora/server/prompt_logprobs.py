"""`prompt_logprobs` in vLLM's shape, which the OpenAI routes and `/inference/v1/generate` share."""

from typing import Any

from multilora.engine.messages import Logprobs
from multilora.front.generation import Sample

PositionLogprobs = dict[str, dict[str, Any]]
"""Token id, as text, to `{"logprob", "rank", "decoded_token"}`; first the prompt's own token, then the best."""


def prompt_logprobs(sample: Sample) -> list[PositionLogprobs | None]:
    """For each token of the sample's prompt; null for the first, which has none. The job has asked for them, and the
    sample's first output has come. `decoded_token` is null on a server without a tokenizer; a `logprob` that is not
    finite is null for the prompt's own token, and left out for others."""
    best = sample.job.prompt_logprobs
    assert best is not None
    tokenizer = sample.vocabulary.tokenizer

    def entry(token: int, logprob: float | None, rank: int | None) -> dict[str, Any]:
        text = None if tokenizer is None else tokenizer.token_text(token)
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    def position(token: int, found: Logprobs) -> PositionLogprobs:
        others = {str(other): entry(other, value, i) for i, (value, other) in enumerate(found.top[:best], 1)}
        return {str(token): entry(token, found.logprob, found.rank)} | others

    pairs = zip(sample.prompt_ids, sample.stream.input_logprobs, strict=True)
    return [None if found is None else position(token, found) for token, found in pairs]
