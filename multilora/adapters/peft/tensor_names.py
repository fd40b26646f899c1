"""What the name of a tensor in an adapter's file says: which module, which part of it, which adapter.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    └── PREFIX ─────┘└── module inside the base model ─┘└ mark┘└adapter┘└leaf┘   prefix and adapter may be missing

It owns PEFT's spellings, old and new, and knows neither the base model nor the config. Called by `contents.py`.
"""

import enum
from dataclasses import dataclass
from functools import lru_cache

PREFIX = "base_model.model."
TOKEN_ADAPTER = "token_adapter"


class Part(enum.Enum):
    """The role of a tensor in its module; the values are for messages."""

    LORA_A = "lora_A"
    LORA_B = "lora_B"
    LORA_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    VELORA = "lora_velora_embed"
    TOKENS = "trainable_tokens_delta"
    WEIGHT = "weight"
    BIAS = "bias"
    # the module that PEFT wraps: for LoRA, for trained tokens, for modules_to_save
    BASE_WEIGHT = "base_layer.weight"
    BASE_BIAS = "base_layer.bias"
    TOKENS_BASE = "token_adapter.base_layer.weight"
    ORIGINAL_WEIGHT = "original_module.weight"
    ORIGINAL_BIAS = "original_module.bias"
    # what modules_to_save trains, under the name it has in memory
    SAVED_WEIGHT = "modules_to_save.weight"
    SAVED_BIAS = "modules_to_save.bias"

    __hash__ = object.__hash__  # Enum's own is a Python function, and an adapter asks thousands of times


# mark → leaf ("" for none) → part
MARKS: dict[str, dict[str, Part]] = {
    "lora_A": {"weight": Part.LORA_A},
    "lora_B": {"weight": Part.LORA_B, "bias": Part.LORA_BIAS},
    "lora_embedding_A": {"": Part.EMBEDDING_A},
    "lora_embedding_B": {"": Part.EMBEDDING_B},
    "lora_magnitude_vector": {"": Part.MAGNITUDE, "weight": Part.MAGNITUDE},
    "lora_velora_embed": {"": Part.VELORA},
    "trainable_tokens_delta": {"": Part.TOKENS},
    "modules_to_save": {"weight": Part.SAVED_WEIGHT, "bias": Part.SAVED_BIAS},
    "base_layer": {"weight": Part.BASE_WEIGHT, "bias": Part.BASE_BIAS},
    "original_module": {"weight": Part.ORIGINAL_WEIGHT, "bias": Part.ORIGINAL_BIAS},
}
WRAPPED = "base_layer"
UNNAMED = ("base_layer", "original_module")  # parts of the base model, which carry no adapter's name
PLAIN = {"weight": Part.WEIGHT, "bias": Part.BIAS}
OF_ONE_ADAPTER = frozenset(part for mark in MARKS if mark not in UNNAMED for part in MARKS[mark].values())


@dataclass(frozen=True)
class TensorName:
    """module: its name inside the base model as the file has it; adapter: None if the name does not say."""

    module: str
    part: Part
    adapter: str | None = None


@lru_cache(maxsize=1 << 14)
def parse(name: str) -> TensorName | None:
    """The parts of a tensor's name; None if PEFT gives no tensor of a LoRA adapter such a name."""
    words = name.removeprefix(PREFIX).split(".")
    at = next((i for i, word in enumerate(words) if word in MARKS), None)
    while at is not None and words[at] == WRAPPED and words[at + 1 : at + 2] and words[at + 1] in MARKS:
        at += 1  # a wrapper of a parameter inside another one: the inner one's module
    if at is None:
        part = PLAIN.get(words[-1])
        return TensorName(".".join(words[:-1]), part) if part and len(words) > 1 else None
    mark, module, rest = words[at], words[:at], words[at + 1 :]
    leaf = rest.pop() if rest and rest[-1] in MARKS[mark] else ""
    part = MARKS[mark].get(leaf)
    if part is None or len(rest) > (mark not in UNNAMED):
        return None
    if module and module[-1] == TOKEN_ADAPTER:
        module.pop()
        part = Part.TOKENS_BASE if part is Part.BASE_WEIGHT else part
        if part not in (Part.TOKENS, Part.TOKENS_BASE):
            return None
    elif part is Part.TOKENS:
        return None
    return TensorName(".".join(module), part, rest[0] if rest else None) if module else None
