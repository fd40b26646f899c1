"""Qwen3-MoE: Qwen3 with a mixture of experts in place of the MLP, in all layers or some."""

from typing import Any

from multilora.models.config import MoeConfig
from multilora.models.moe import check_experts, sparse_layers
from multilora.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
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
        )
        return super().settings(hf) | {"sliding_window": hf.sliding_window, "moe": moe}
