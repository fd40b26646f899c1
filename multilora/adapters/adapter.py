"""An adapter as `checkpoint.py` hands it on: typed blocks, PEFT's rules already applied.

From here on nobody knows about alpha, rsLoRA, patterns or file formats.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """`y += (x Aᵀ) B` at one module of one layer.

    a: [rank, in_features]; b: [rank, out_features] (PEFT's lora_B transposed, times the scaling, in fp32); b may be
    a transposed view.
    """

    layer: int
    module: str  # "q_proj"
    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterLimits:
    """Limits set at start; None: none."""

    max_rank: int | None = None
    target_modules: tuple[str, ...] | None = None  # already without "all"


@dataclass(frozen=True)
class Adapter:
    """All blocks of one adapter. `fingerprint` changes when the files do (see `checkpoint.fingerprint`)."""

    blocks: tuple[LowRank, ...]
    fingerprint: str

    @property
    def rank(self) -> int:
        return max((b.rank for b in self.blocks), default=0)

    @property
    def target_modules(self) -> list[str]:
        return sorted({b.module for b in self.blocks})
