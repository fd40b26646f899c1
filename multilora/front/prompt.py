"""Checks at the door: what of a request depends on the model's context and vocabulary.

Pure functions; raise BadRequest. Called by `server/` and `llm/` before a request goes to the engine.
"""

import itertools
from collections.abc import Sequence

import msgspec

from multilora.errors import BadRequest, PromptTooLong
from multilora.params import SamplingParams


def check_prompt(ids: Sequence[int], context_length: int, vocab_size: int, *, param: str = "input_ids") -> None:
    """Raise BadRequest unless every id is in the vocabulary and at least one new token fits the context."""
    if not ids:
        raise BadRequest("the prompt is empty: it needs at least one token", param=param)
    for i in ids:
        if not 0 <= i < vocab_size:
            raise BadRequest(f"token id {i} is outside the vocabulary of {vocab_size} tokens", param=param)
    if len(ids) >= context_length:
        raise PromptTooLong(
            f"the prompt has {len(ids)} tokens; the model's context is {context_length}, answer included", param=param
        )


def engine_params(
    params: SamplingParams,
    prompt_tokens: int,
    context_length: int,
    vocab_size: int,
    *,
    sample: int = 0,
    ends: Sequence[int] = (),
) -> SamplingParams:
    """What the engine needs of `params` for one sample (number `sample` of `n`): limits clamped to the context,
    text (stop strings, grammar source) left out, as it stays in the front. ends: ids that end this answer as the
    model's EOS does. Raises BadRequest."""
    for token in itertools.chain(params.stop_token_ids or (), map(int, params.logit_bias or ())):
        if token >= vocab_size:
            name = "stop_token_ids" if token in (params.stop_token_ids or ()) else "logit_bias"
            raise BadRequest(
                f"sampling_params.{name}: token id {token} is outside the vocabulary of {vocab_size} tokens",
                param=name,
            )
    room = context_length - prompt_tokens
    limit = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
    seed = params.sampling_seed
    stops = params.stop_token_ids
    if ends and not params.ignore_eos:
        stops = [*(stops or ()), *ends]
    return msgspec.structs.replace(
        params,
        max_new_tokens=limit,
        min_new_tokens=min(params.min_new_tokens, limit),
        sampling_seed=None if seed is None else _wrap_int64(seed + sample),
        n=1,
        stop_token_ids=stops,
        stop=None,
        stop_regex=None,
        json_schema=None,
        regex=None,
        ebnf=None,
    )


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
