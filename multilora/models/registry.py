"""Which architectures are served by which class, by the name in a checkpoint's config.json.

Those of `ARCHITECTURES` have a file here, which is the fast way; any other that transformers can build runs through
its own modules (`transformers_backend/`), if an examination finds nothing against it. Importing that takes as long as
torch itself and is left to the models that need it.
"""

from collections.abc import Iterator
from typing import Any

from multilora.errors import ModelUnsupported
from multilora.models.base import CausalLM
from multilora.models.llama import LlamaForCausalLM
from multilora.models.mistral import MistralForCausalLM
from multilora.models.mixtral import MixtralForCausalLM
from multilora.models.qwen2 import Qwen2ForCausalLM
from multilora.models.qwen2_moe import Qwen2MoeForCausalLM
from multilora.models.qwen3 import Qwen3ForCausalLM
from multilora.models.qwen3_moe import Qwen3MoeForCausalLM

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen2MoeForCausalLM": Qwen2MoeForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
}


def model_classes(raw_config: dict[str, Any], model_impl: str) -> Iterator[type[CausalLM]]:
    """The classes for a raw config.json, to be tried in this order. model_impl: as --model-impl.

    Raises ModelUnsupported naming the architecture and what is supported.
    """
    names = raw_config.get("architectures") or []
    native = [ARCHITECTURES[names[0]]] if len(names) == 1 and names[0] in ARCHITECTURES else []
    if model_impl == "native" and not native:
        found = ", ".join(names) or f"unknown (model_type {raw_config.get('model_type')!r})"
        raise ModelUnsupported(
            f"--model-impl native: architecture {found} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return _in_order(native if model_impl != "transformers" else [], others=model_impl != "native")


def _in_order(native: list[type[CausalLM]], *, others: bool) -> Iterator[type[CausalLM]]:
    yield from native
    if others:
        from multilora.models.transformers_backend.model import TransformersCausalLM

        yield TransformersCausalLM
