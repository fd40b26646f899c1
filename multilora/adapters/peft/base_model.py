"""What an adapter is held against: the base model's places and sizes, in plain types.

Made once by the engine, sent to the loader process, asked by `checkpoint`. Knows no tensors; `weights_dir` is where
the base model's own can be found.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from multilora.lora.sites import MODEL_LEVEL, LoraSite, module_shapes, num_layers

if TYPE_CHECKING:  # it would bring transformers into the loader process
    from multilora.models.config import ModelConfig

FINAL_NORM = "norm"
EMBED, HEAD = "embed_tokens", "lm_head"
TABLES = (EMBED, HEAD)  # [vocab, hidden]; in tied models the same one

PARENTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"), "self_attn."),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp."),
}


class Place(NamedTuple):
    """One module of the base model. layer: MODEL_LEVEL for embed_tokens, lm_head and the final norm."""

    layer: int
    module: str


@dataclass(frozen=True)
class BaseModel:
    """One base model as adapters see it. Module names are the last component of PEFT's: "q_proj", "q_norm"."""

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

    @cached_property
    def order(self) -> dict[str, int]:
        """Linear module → its position, as the sites have it."""
        return {module: i for i, module in enumerate(self.shapes)}

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every module that has parameters, by its name inside the base model: "model.layers.0.mlp.up_proj"."""
        found: dict[str, Place] = {}
        inside = [m for m in (*self.shapes, *self.norms) if m not in (*TABLES, FINAL_NORM)]
        for layer in range(self.num_layers):
            for module in inside:
                found[f"model.layers.{layer}.{PARENTS.get(module, '')}{module}"] = Place(layer, module)
        if EMBED in self.shapes:
            found[f"model.{EMBED}"] = Place(MODEL_LEVEL, EMBED)
        if FINAL_NORM in self.norms:
            found[f"model.{FINAL_NORM}"] = Place(MODEL_LEVEL, FINAL_NORM)
        if HEAD in self.shapes:
            found[HEAD] = Place(MODEL_LEVEL, HEAD)
        return found
