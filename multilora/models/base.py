"""The contract of a model family: everything that the rest of the package uses of a model.

A family is one file that subclasses `CausalLM`, and one line in `registry.py`. Its modules declare themselves through
`self.declared` while they are built; the methods below that are not abstract follow from the config and from those
declarations.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationConfig

from multilora.attention.base import AttentionShape
from multilora.distributed.group import SINGLE, Group
from multilora.distributed.partition import unit_part
from multilora.layers.context import ForwardContext
from multilora.layers.embedding import LMHead
from multilora.layers.linear import Linear
from multilora.layers.score import ScoreHead
from multilora.lora.sharding import local_sites
from multilora.lora.sites import LAYERS, DeclaredModules, LoraSite, LoraSlice, NormModule
from multilora.memory.kv_layout import KVLayout
from multilora.models.config import ModelConfig
from multilora.models.kv_scales import KVScales
from multilora.models.weights import fill_dummy, load_weights


class CausalLM(nn.Module, ABC):
    """A decoder with a language-model head, computed in `config.dtype` on `device` by the ranks of `group` together.

    The constructor of a family allocates this rank's weights; `load` fills them in place, so their addresses never
    change. `config` and `lora_sites` describe the whole model; KV, attention and weights are this rank's. Raises
    ConfigError naming the module that cannot be divided among the ranks.
    """

    older_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Parts of the names that modules have in checkpoints and adapters, and what they are called here."""

    def __init__(self, config: ModelConfig, device: torch.device, group: Group = SINGLE):
        super().__init__()
        self.config = config
        self.device = device
        self.group = group
        self.declared = DeclaredModules()
        labels = len(config.classifier.labels) if config.classifier else 0
        self.score = ScoreHead(labels, config.hidden_size, device=device, dtype=config.dtype)

    @classmethod
    @abstractmethod
    def configure(
        cls, hf: Any, *, generation: GenerationConfig | None, context_length: int | None, dtype: torch.dtype
    ) -> ModelConfig:
        """The config of a model of this class, from transformers' one. context_length: what was asked for.

        Raises ModelUnsupported for a setting that the class would compute wrongly, ConfigError for a context beyond
        the model's.
        """

    @abstractmethod
    def embed(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """ids: int64 [tokens]. Returns [tokens, hidden]."""

    @abstractmethod
    def forward(self, x: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: what `embed` returned, [tokens, hidden]; positions: int64 [tokens].

        Writes the new tokens' keys and values to their pages (`ctx.attention`, once for each layer from 0 up) and
        returns their hidden rows after the final norm, [tokens, hidden].
        """

    @abstractmethod
    def logits(self, hidden_rows: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """hidden_rows: [rows, hidden]; the context's segments count these rows. Returns fp32 [rows, vocab].

        Only of a model that `config.generates`.
        """

    def scores(self, hidden_rows: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """What the classification head makes of [rows, hidden], the base model's or an adapter's: see `ScoreHead`."""
        found: torch.Tensor = self.score(hidden_rows, ctx)
        return found

    def load(self, model_path: str, *, load_format: str, revision: str | None, seed: int) -> None:
        """Fill the weights from the checkpoint of a directory or hub id; load_format "dummy": with seeded noise.

        Raises ModelUnsupported for tensors that do not fit the model, ConfigError for a missing or broken file.
        """
        if load_format == "dummy":
            fill_dummy(self, seed, self.group.rank)
        else:
            load_weights(self, model_path, revision, self.older_names, self.kv_scales.destinations())

    def lora_sites(self) -> tuple[LoraSite, ...]:
        """Every linear layer, the embedding and the head, by `LoraSite.index`."""
        return tuple(self.declared.sites)

    def local_sites(self) -> tuple[LoraSite, ...]:
        """`lora_sites` as each rank computes them."""
        return local_sites(self.lora_sites(), self.group.size)

    def without_adapters(self) -> tuple[str, ...]:
        """The paths of modules whose parameters no adapter can change, for messages."""
        return ()

    def norms(self) -> tuple[NormModule, ...]:
        """Every norm that adapters can replace."""
        return tuple(self.declared.norms)

    def kv_layout(self, page_size: int) -> KVLayout:
        """How `page_size` tokens of KV lie in a page of the arena."""
        config, window_of = self.config, self.attention_shape.window_of
        windows = [window_of(layer) for layer in range(config.num_layers)]
        windows = [None if w is None or w >= config.context_length else w for w in windows]
        return KVLayout(
            config.num_layers, page_size, self._kv_heads, config.head_dim, config.kv_dtype, tuple(windows)
        )

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can hold its layers: no forward pass waits for the device."""
        return True

    @property
    def attends_one_by_one(self) -> bool:
        """Whether what attention returns has been used when it is called the next time."""
        return True

    @cached_property
    def kv_scales(self) -> KVScales:
        """What stored keys and values are multiplied with, where the KV cache is of 8-bit floats."""
        return KVScales([self.attention_path(layer) for layer in range(self.config.num_layers)])

    def attention_path(self, layer: int) -> str:
        """The path of a layer's attention, as checkpoints have it."""
        return f"{self.layers_path}.{layer}.self_attn"

    @property
    def layers_path(self) -> str:
        """The path of the list of decoder layers, as PEFT's names have it."""
        return LAYERS

    @property
    @abstractmethod
    def attention_shape(self) -> AttentionShape:
        """What the attention backend has to compute."""

    @property
    def _kv_heads(self) -> int:
        """The number of KV heads that this rank holds."""
        return len(unit_part(self.config.num_kv_heads, 1, self.group.rank, self.group.size, replicate=True))

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def base_weight(self, layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [out, in] and bias [out] of a LoRA target that is a matrix (any but the embedding), dequantised.

        Both may share memory with the model, so they are read-only. Raises KeyError if there is no such target.
        """
        matrix, part = self._matrices[layer, module]
        return matrix.base_weight(part)

    @cached_property
    def _matrices(self) -> dict[tuple[int, str], tuple[Linear | LMHead, LoraSlice]]:
        found = [m for m in self.modules() if isinstance(m, Linear | LMHead)]
        return {(m.site.layer, part.module): (m, part) for m in found for part in m.site.slices}
