"""Mixtral: Mistral with a mixture of experts in every layer, whose parts have other names in checkpoints."""

from typing import Any

from multilora.models.config import MoeConfig
from multilora.models.llama import LlamaForCausalLM
from multilora.models.moe import check_experts


class MixtralForCausalLM(LlamaForCausalLM):
    older_names = (
        (".block_sparse_moe.", ".mlp."),
        (".w1.", ".gate_proj."),
        (".w3.", ".up_proj."),
        (".w2.", ".down_proj."),
    )

    @classmethod
    def settings(cls, hf: Any) -> dict[str, Any]:
        check_experts(hf)
        moe = MoeConfig(
            layers=frozenset(range(hf.num_hidden_layers)),
            num_experts=hf.num_experts,
            top_k=hf.num_experts_per_tok,
            intermediate_size=hf.intermediate_size,
            normalised=True,
            rounded=False,
        )
        return {"sliding_window": hf.sliding_window, "moe": moe}
