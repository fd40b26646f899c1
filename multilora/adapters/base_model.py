"""What an adapter is held against: the base model's places and sizes, in plain types.

Made once by the engine, sent to the loader process, asked by `checkpoint`. Knows no tensors; `weights_dir` is where
the base model's own can be found.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from multilora.lora.sites import LoraSite, module_shapes, num_layers

if TYPE_CHECKING:  # it would bring transformers into the loader process
    from multilora.models.config import ModelConfig

FINAL_NORM = "norm"


@dataclass(frozen=True)
class BaseModel:
    """One base model as adapters see it. Module names are PEFT's last component: "q_proj", "input_layernorm"."""

    sites: tuple[LoraSite, ...]
    vocab_size: int
    hidden_size: int
    tie_word_embeddings: bool
    norms: dict[str, int]  # module → size; all but FINAL_NORM are in every layer
    biased: tuple[str, ...]  # linear modules that have a bias
    weights_dir: str | None = None  # a local directory with the checkpoint; None: there is none

    @classmethod
    def of(cls, config: "ModelConfig", sites: tuple[LoraSite, ...], weights_dir: str | None) -> "BaseModel":
        hidden = config.hidden_size
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden, FINAL_NORM: hidden}
        if config.qk_norm:
            norms |= {"q_norm": config.head_dim, "k_norm": config.head_dim}
        biased = (
            *(("q_proj", "k_proj", "v_proj") if config.qkv_bias else ()),
            *(("o_proj",) if config.o_bias else ()),
            *(("gate_proj", "up_proj", "down_proj") if config.mlp_bias else ()),
        )
        return cls(sites, config.vocab_size, hidden, config.tie_word_embeddings, norms, biased, weights_dir)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Linear module (embed_tokens and lm_head too) → (in_features, out_features)."""
        return module_shapes(self.sites)

    @cached_property
    def num_layers(self) -> int:
        return num_layers(self.sites)
