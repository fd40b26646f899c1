"""Rotary embeddings of transformers whose frequencies follow the longest text in a batch: made to stand still.

A batch of ours mixes texts of all lengths, and keys in pages stay as they were rotated. LongRoPE (Phi-3, Phi-4) has
two sets of frequencies, for texts up to the original length and beyond; which one serves is decided by the context
length that the server is started with. Dynamic NTK changes nothing up to the original length: that is the limit.
"""

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from multilora.errors import ConfigError

FIXED = "fixed"
MOVING = ("dynamic", "longrope")


def rope_rules(hf: Any) -> list[dict[str, Any]]:
    """The rule of each kind of layer; one where all layers have the same, none without rotary embeddings."""
    rules = getattr(hf, "rope_parameters", None) or {}
    return [rules] if "rope_type" in rules else [r for r in rules.values() if isinstance(r, dict)]


def moving_limit(hf: Any) -> int | None:
    """The number of positions up to which the frequencies stand still; None: always."""
    limits = []
    for rule in rope_rules(hf):
        if rule.get("rope_type") in MOVING:
            own = int(hf.max_position_embeddings)
            original = rule.get("original_max_position_embeddings") or getattr(
                hf, "original_max_position_embeddings", None
            )
            limits.append(int(original or own))
    return min(limits, default=None)


def check_context(hf: Any, asked: int) -> None:
    """Raise ConfigError for a context at which dynamic frequencies would move."""
    limit = moving_limit(hf)
    if limit is not None and asked > limit and any(r.get("rope_type") == "dynamic" for r in rope_rules(hf)):
        raise ConfigError(
            f"--context-length {asked} is more than {limit}, from where the model's rotary frequencies (dynamic NTK) "
            "change with every token, which a cache of keys cannot follow"
        )


def hold_still(module: Any, context_length: int) -> None:
    """Fix the frequencies of a rotary embedding, whose buffers are filled, for this context."""
    kind = getattr(module, "rope_type", None)
    if kind is None:
        return
    by_layer = isinstance(kind, dict)
    kinds = kind if isinstance(kind, dict) else {None: kind}
    for layer_type, name in kinds.items():
        if name == "longrope":
            _choose_longrope(module, layer_type, context_length)
    if any(name in MOVING for name in kinds.values()):
        module.rope_type = dict.fromkeys(kinds, FIXED) if by_layer else FIXED


def _choose_longrope(module: Any, layer_type: str | None, context_length: int) -> None:
    limit = moving_limit(module.config)
    if limit is None or context_length <= limit:
        return
    more = {"layer_type": layer_type} if layer_type is not None else {}
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, torch.device("cpu"), seq_len=limit + 1, **more)
    buffer = getattr(module, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
    buffer.copy_(frequencies)
