"""What the engine tells the sampler about one request, as plain data: it travels to every rank that samples."""

import msgspec

from multilora.params import SamplingParams


class SamplingState(msgspec.Struct, frozen=True, kw_only=True):
    """All that sampling must know of one request; sent once, when the request gets its sampling slot."""

    slot: int
    params: SamplingParams  # the engine's form (front.prompt.engine_params)
    seed: int  # params.sampling_seed, or one drawn at admission
    vocab_size: int  # of the adapter's own head, or the base model's
    prompt_ids: list[int] = []  # only filled when a repetition penalty needs them
    end_ids: tuple[int, ...] = ()  # tokens that end the answer: min_new_tokens forbids them, no grammar sees them
    top_logprobs: int = -1  # -1: no logprobs; 0: the chosen token's; k: also those of the k best tokens
    ranks: bool = False  # with the logprobs
    processed: bool = False  # the logprobs are of what the token was drawn from, else of the raw logits
    grammar: str | None = None  # an xgrammar CompiledGrammar, serialized to JSON


def needs_prompt(params: SamplingParams) -> bool:
    """Whether `SamplingState.prompt_ids` must be filled."""
    return params.repetition_penalty != 1.0


def needs_counts(params: SamplingParams) -> bool:
    """Whether the request's tokens must be counted."""
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
