"""What of a base model decides memory and time, from its config alone: sizes of weights, KV and adapters.

The sizes are asked of the same code that the engine allocates and packs with. Where GPUs share a model, they are
those of one of them. Called by `planner.py`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from multilora.adapters.packing.blocks import PackTarget
from multilora.distributed.group import SINGLE, SingleRank
from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.weights.base import ExpertsWeight
from multilora.lora.device_table import table_bytes_per_page
from multilora.lora.panels import AdapterShape
from multilora.lora.sites import EMBED, HEAD, MODEL_LEVEL, LoraSite
from multilora.memory.kv_layout import KVLayout
from multilora.models.base import CausalLM
from multilora.models.config import NativeConfig
from multilora.models.load import make_model

if TYPE_CHECKING:
    from multilora.models.transformers_backend.probe import ExpertsFact


class PlannedRank(SingleRank):
    """The first of `size` ranks that are not there: its model is allocated, and never computed."""

    def __init__(self, size: int):
        self.size = size


@dataclass(frozen=True)
class ModelFacts:
    """One base model as one GPU holds it, alone or as one of `tp_size`."""

    path: str
    model: CausalLM  # on the meta device: it has no weights
    layout: KVLayout
    targets: tuple[str, ...] | None  # modules that adapters act on; None: every linear layer that is no expert's

    @property
    def tp_size(self) -> int:
        return self.model.group.size

    @cached_property
    def sites(self) -> tuple[LoraSite, ...]:
        return self.model.local_sites()

    @cached_property
    def pack_target(self) -> PackTarget:
        config = self.model.config
        return PackTarget.of(self.model.lora_sites(), config.adapter_dtype, self.layout.page_bytes, self.tp_size)

    @property
    def layers(self) -> int:
        return self.model.config.num_layers

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes

    @cached_property
    def parameters(self) -> int:
        """Numbers that each token is multiplied with: all linear layers, of experts those that it takes, the head."""
        body = sum(s.in_features * s.out_features for s in self.sites if s.layer != MODEL_LEVEL and not s.experts)
        expert = sum(s.in_features * s.out_features for s in self.sites if s.experts)
        if self._tree_experts:  # not all have sites, and ranks divide the experts of each
            expert = sum(3 * fact.hidden * fact.inner for fact in self._tree_experts)
        return body + (expert * self.top_k + self._table) // self.tp_size

    @property
    def top_k(self) -> int:
        """Experts that a token takes; 0 in a model without any."""
        return self._taken[0]

    @cached_property
    def _taken(self) -> tuple[int, int]:
        """How many experts a token takes in a layer, and of how many; (0, 1) in a model without any."""
        config = self.model.config
        if isinstance(config, NativeConfig):
            return (config.moe.top_k, config.moe.num_experts) if config.moe else (0, 1)
        first = next(iter(self._tree_experts), None)
        return (first.top_k, first.experts) if first else (0, 1)

    @property
    def _tree_experts(self) -> "tuple[ExpertsFact, ...]":
        """The mixtures of a model that runs through transformers' modules."""
        examination = getattr(self.model.config, "examination", None)  # transformers is not imported for natives
        found: tuple[ExpertsFact, ...] = examination.experts if examination else ()
        return found

    @cached_property
    def expert_layers(self) -> int:
        return len(self._tree_experts) or len({site.layer for site in self.sites if site.experts})

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all experts that a GPU holds, as they are held: in 16 bit, or in 8 or 4 with their scales."""
        native = (module for module in self.model.modules() if isinstance(module, ExpertsWeight))
        tree = (self.model.get_submodule(f"lm.{fact.path}") for fact in self._tree_experts)
        return sum(param.nbytes for experts in (*native, *tree) for param in experts.parameters())

    def experts_taken(self, rows: int) -> float:
        """The share of the experts that `rows` tokens take, if all are taken equally often."""
        taken, experts = self._taken
        return 1 - (1 - taken / experts) ** rows

    @property
    def _table(self) -> int:
        """Numbers in the table of embeddings, which is as large as the head."""
        return self.model.config.vocab_size * self.model.config.hidden_size

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of weights that a step of many rows reads: all but the table of embeddings, of which it looks up a
        few rows."""
        if self.model.config.tie_word_embeddings:
            return self.weight_bytes
        return self.weight_bytes - self._table * self.model.config.dtype.itemsize // self.tp_size

    @cached_property
    def table_bytes(self) -> int:
        return table_bytes_per_page(self.pack_target.sites, self.pack_target.geometry)

    def adapter_pages(self, rank: int) -> int:
        """Pages of one adapter, by the engine's own packing."""
        ranks = tuple(tuple(rank if self.acts_on(s.module, site) else 0 for s in site.slices) for site in self.sites)
        return self.pack_target.layout(AdapterShape(ranks)).num_pages

    def adapter_bytes(self, rank: int) -> int:
        """Bytes of its numbers, without the pages' padding: what a step reads."""
        return rank * self.adapter_widths * self.model.config.adapter_dtype.itemsize

    @cached_property
    def adapter_widths(self) -> int:
        """Sum of what the matrices A read and the matrices B write, over all modules that adapters act on."""
        return sum(
            site.in_features + s.out_features
            for site in self.sites
            for s in site.slices
            if self.acts_on(s.module, site)
        )

    def acts_on(self, module: str, site: LoraSite) -> bool:
        """Whether the adapters act on this module of a site."""
        if self.targets is None:
            return site.layer != MODEL_LEVEL and module not in (EMBED, HEAD) and not site.experts
        return module in self.targets or module.rpartition(".")[2] in self.targets


def model_facts(
    path: str,
    *,
    page_size: int = 16,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
    targets: tuple[str, ...] | None = None,
    tp_size: int = 1,
) -> ModelFacts:
    """The facts of a directory or hub id, of which only JSON files are read. Raises ConfigError for a path or a
    target that is not there, or a model that so many GPUs cannot share, ModelUnsupported for what is not served, and
    for adapters on experts, whose steps were not measured."""
    model = make_model(
        path,
        dtype=dtype,
        device=torch.device("meta"),
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        group=PlannedRank(tp_size) if tp_size > 1 else SINGLE,
    )
    if model.config.dtype == torch.float32 and dtype == "auto":  # a GPU is meant, whose kernels are for 16 bit
        return model_facts(
            path,
            page_size=page_size,
            dtype="bfloat16",
            kv_cache_dtype=kv_cache_dtype,
            quantization=quantization,
            targets=targets,
            tp_size=tp_size,
        )
    facts = ModelFacts(path, model, model.kv_layout(page_size), targets)
    known = {s.module.rpartition(".")[2] for site in facts.sites for s in site.slices}
    for target in targets or ():
        if target.rpartition(".")[2] not in known:
            raise ConfigError(f"--target-modules: {path} has no module {target!r}; it has {', '.join(sorted(known))}")
    of_experts = sorted(
        {s.module for site in facts.sites if site.experts for s in site.slices if facts.acts_on(s.module, site)}
    )
    if of_experts:
        raise ModelUnsupported(f"plan: steps of adapters on experts ({', '.join(of_experts)}) were not measured")
    return facts
