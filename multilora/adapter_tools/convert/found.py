"""What a reader of another writer's format found: matrices by module, with rank and alpha, or tensors that are PEFT's
already. `convert.py` writes it down.

Called by `convert.py`, and made by the readers beside it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from multilora.adapter_tools.pairs import LoraPair, peft_config, peft_tensors
from multilora.errors import AdapterInvalid


@dataclass
class FoundAdapter:
    """An adapter in the making. pairs: by the module's name inside the base model; alphas: of each; config: fields
    beyond rank, alpha and targets; tensors: others, under PEFT's names; notes: what a person should know."""

    writer: str
    pairs: dict[str, LoraPair] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, module: str, a: torch.Tensor, b: torch.Tensor, alpha: float, *, embedding: bool = False) -> None:
        """One module. a: [rank, in]; b: [out, rank]. Raises AdapterInvalid if they do not go together."""
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise AdapterInvalid(f"{module}: matrices of {list(a.shape)} and {list(b.shape)} do not go together")
        self.pairs[module] = LoraPair(a.contiguous(), b.contiguous(), alpha / a.shape[0], embedding)
        self.alphas[module] = alpha

    def written(self, base_model: str | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The config, and all tensors under PEFT's names. Raises AdapterInvalid if there are none."""
        if not self.pairs and not self.tensors:
            raise AdapterInvalid("there is no LoRA matrix in the file")
        if not self.pairs:
            return self.config, self.tensors
        ranks = {module: pair.rank for module, pair in self.pairs.items()}
        config = peft_config(ranks, self.alphas, base_model=base_model, **self.config)
        return config, peft_tensors(self.pairs) | self.tensors
