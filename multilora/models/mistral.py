"""Mistral: Llama with a sliding window, the same in every layer, which the attention backend applies."""

from typing import Any

from multilora.models.config import uniform_window
from multilora.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    @classmethod
    def settings(cls, hf: Any) -> dict[str, Any]:
        uniform_window(hf)  # refuses mixed layers, which newer Mistral-like checkpoints have
        return {"sliding_window": hf.sliding_window}
