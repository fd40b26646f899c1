"""What a layer needs besides its input: the backends, prepared for this step. Passed down, never global."""

from dataclasses import dataclass

from multilora.attention.base import AttentionBackend
from multilora.lora.base import LoraBackend


@dataclass(frozen=True, slots=True)
class ForwardContext:
    attention: AttentionBackend
    lora: LoraBackend | None  # None: no row of this step has an adapter
