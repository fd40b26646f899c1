"""Qwen2-MoE and Qwen1.5-MoE: Qwen2 with a mixture of experts, beside which every token takes a shared expert."""

from typing import Any

from multilora.models.config import uniform_window
from multilora.models.llama import LlamaForCausalLM
from multilora.models.moe import qwen_experts


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    @classmethod
    def settings(cls, hf: Any) -> dict[str, Any]:
        return {
            "qkv_bias": hf.qkv_bias,
            "sliding_window": uniform_window(hf),
            "moe": qwen_experts(hf, hf.shared_expert_intermediate_size),
        }
