"""Qwen3-MoE: Qwen3 with a mixture of experts in place of the MLP, in all layers or some."""

from typing import Any

from multilora.models.moe import qwen_experts
from multilora.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    @classmethod
    def settings(cls, hf: Any) -> dict[str, Any]:
        return super().settings(hf) | {"sliding_window": hf.sliding_window, "moe": qwen_experts(hf)}
