"""What a layer needs besides its input: the backends, prepared for this step. Passed down, never global."""

from dataclasses import dataclass

from multilora.attention.base import LayerAttention
from multilora.lora.base import LoraBackend
from multilora.lora.full_weights import FullWeightModules


@dataclass(frozen=True, slots=True)
class ForwardContext:
    attention: LayerAttention
    lora: LoraBackend | None  # None: no row of this step has an adapter
    full_weights: FullWeightModules | None = None  # None: no adapter of this step acts outside the low-rank pass
