"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from typing import Any

from multilora.models.config import uniform_window
from multilora.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    @classmethod
    def settings(cls, hf: Any) -> dict[str, Any]:
        return {"qkv_bias": True, "sliding_window": uniform_window(hf)}
