"""An adapter as `peft/checkpoint.py` returns it: typed blocks, with PEFT's rules applied.

No later stage knows about patterns, rsLoRA, trained tokens or file formats. Weights stay in the dtype of the file;
`scaling` is the factor that PEFT multiplies by, which the packer folds in, in fp32, before it rounds once.

    LowRank   y += scaling · (x Aᵀ) B           any linear layer, embed_tokens, lm_head
    Vector    DoRA's magnitude, a trained bias, a bias on lora_B
    Full      the full weight of a module, which replaces the base model's (modules_to_save)
    Rows      some rows of embed_tokens or lm_head, which replace the base model's (trained tokens)
"""

import enum
from dataclasses import dataclass

import torch

from multilora.lora.sites import MODEL_LEVEL

__all__ = ["MODEL_LEVEL", "Adapter", "AdapterLimits", "Block", "Full", "LowRank", "Rows", "Vector", "VectorKind"]


@dataclass(frozen=True)
class LowRank:
    """`y += scaling · (x Aᵀ) B` at one module of one layer.

    a: [rank, in_features]; b: [rank, out_features], PEFT's lora_B transposed (it may be a transposed view). Both in
    the file's dtype. For embed_tokens (layer MODEL_LEVEL) in_features is the vocabulary and x a one-hot row. At a
    site of experts: a: [experts, rank, in_features], b: [experts, rank, out_features], or [1, …] where all experts
    share it. trained_rank: PEFT's, where modules with one each have been made one of a larger rank.
    """

    layer: int
    module: str  # "q_proj"
    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0
    trained_rank: int | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


class VectorKind(enum.Enum):
    """What a `Vector` does; the values are for messages."""

    MAGNITUDE = "lora_magnitude_vector"  # DoRA: m of  m / ‖W + scaling · BA‖, one norm per output
    BIAS = "bias"  # replaces the base model's bias
    LORA_BIAS = "lora_B.bias"  # added, times `scaling`


@dataclass(frozen=True)
class Vector:
    """One trained number per output of a linear module. value: [out_features]."""

    layer: int
    module: str
    kind: VectorKind
    value: torch.Tensor
    scaling: float = 1.0  # differs from 1 for LORA_BIAS only


@dataclass(frozen=True)
class Full:
    """The full weight of a module: a linear layer [out, in], embed_tokens or lm_head [vocab, hidden], a norm [size].

    layer: MODEL_LEVEL for embed_tokens, lm_head and the final "norm".
    """

    layer: int
    module: str  # "q_proj", "input_layernorm", "norm", "lm_head"
    weight: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of embed_tokens or lm_head. token_ids: ascending; weight: [len(token_ids), hidden]."""

    module: str
    token_ids: tuple[int, ...]
    weight: torch.Tensor


Block = LowRank | Vector | Full | Rows


@dataclass(frozen=True)
class AdapterLimits:
    """Limits set at start; None: no limit."""

    max_rank: int | None = None
    target_modules: tuple[str, ...] | None = None  # already without "all"


@dataclass(frozen=True)
class StoredLayout:
    """What adapters that are alike have in common. key: a digest of config and header, as they were read; tensors:
    start and bytes of each in the file, in order, one behind the other."""

    key: str
    tensors: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Adapter:
    """All blocks of one adapter. `fingerprint` changes with what the files hold (see `sources/fingerprint`). stored:
    config and header alone decide what the blocks are; None: the numbers, too, or there are several files.

    invocation_tokens: with activated LoRA, the adapter acts from the last occurrence of this sequence in the prompt
    on; None: it always acts.
    """

    blocks: tuple[Block, ...]
    fingerprint: str
    invocation_tokens: tuple[int, ...] | None = None
    stored: StoredLayout | None = None

    @property
    def rank(self) -> int:
        """The largest rank of its blocks; 0 if none is low rank."""
        return max((b.trained_rank or b.rank for b in self.blocks if isinstance(b, LowRank)), default=0)

    @property
    def target_modules(self) -> list[str]:
        """The modules that it changes, sorted."""
        return sorted({b.module for b in self.blocks})
