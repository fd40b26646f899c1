"""Which architectures are served, by the name in a checkpoint's config.json."""

from typing import Any

from multilora.errors import ModelUnsupported
from multilora.models.base import CausalLM
from multilora.models.llama import LlamaForCausalLM
from multilora.models.mistral import MistralForCausalLM
from multilora.models.qwen2 import Qwen2ForCausalLM
from multilora.models.qwen3 import Qwen3ForCausalLM

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def model_class(raw_config: dict[str, Any]) -> type[CausalLM]:
    """The class for a raw config.json. Raises ModelUnsupported naming the architecture and what is supported."""
    names = raw_config.get("architectures") or []
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        found = ", ".join(names) or f"unknown (model_type {raw_config.get('model_type')!r})"
        raise ModelUnsupported(f"architecture {found} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[names[0]]
