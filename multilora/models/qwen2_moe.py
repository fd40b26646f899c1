"""Qwen2-MoE and Qwen1.5-MoE: Qwen2 with a mixture of experts, beside which every token takes a shared expert."""

from typing import Any

from multilora.models.config import MoeConfig, uniform_window
from multilora.models.llama import LlamaForCausalLM
from multilora.models.moe import check_experts, sparse_layers


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    @classmethod
    def settings(cls, hf: Any) -> dict[str, Any]:
        check_experts(hf)
        moe = MoeConfig(
            layers=sparse_layers(hf),
            num_experts=hf.num_experts,
            top_k=hf.num_experts_per_tok,
            intermediate_size=hf.moe_intermediate_size,
            normalised=hf.norm_topk_prob,
            rounded=True,
            shared_size=hf.shared_expert_intermediate_size,
        )
        return {"qkv_bias": hf.qkv_bias, "sliding_window": uniform_window(hf), "moe": moe}
