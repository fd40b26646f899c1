"""What of a base model decides memory and time, from its config alone: sizes of weights, KV and adapters.

The sizes are asked of the same code that the engine allocates and packs with. Called by `planner.py`.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from multilora.adapters.packing.blocks import PackTarget
from multilora.errors import ConfigError, ModelUnsupported
from multilora.lora.device_table import table_bytes_per_page
from multilora.lora.panels import AdapterShape
from multilora.lora.sites import EMBED, HEAD, MODEL_LEVEL, LoraSite
from multilora.memory.kv_layout import KVLayout
from multilora.models.base import CausalLM
from multilora.models.load import make_model


@dataclass(frozen=True)
class ModelFacts:
    """One base model as one GPU holds it."""

    path: str
    model: CausalLM  # on the meta device: it has no weights
    layout: KVLayout
    targets: tuple[str, ...] | None  # modules that adapters act on; None: every linear layer

    @cached_property
    def sites(self) -> tuple[LoraSite, ...]:
        return self.model.lora_sites()

    @cached_property
    def pack_target(self) -> PackTarget:
        return PackTarget.of(self.sites, self.model.config.adapter_dtype, self.layout.page_bytes, 1)

    @property
    def layers(self) -> int:
        return self.model.config.num_layers

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes

    @cached_property
    def parameters(self) -> int:
        """Numbers that each token is multiplied with: all linear layers and the head."""
        body = sum(s.in_features * s.out_features for s in self.sites if s.layer != MODEL_LEVEL)
        return body + self.model.config.hidden_size * self.model.config.vocab_size

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of weights that a step reads: all but the table of embeddings, of which it looks up a few rows."""
        if self.model.config.tie_word_embeddings:
            return self.weight_bytes
        table = self.model.config.vocab_size * self.model.config.hidden_size * self.model.config.dtype.itemsize
        return self.weight_bytes - table

    @cached_property
    def table_bytes(self) -> int:
        return table_bytes_per_page(self.pack_target.sites, self.pack_target.geometry)

    def adapter_pages(self, rank: int) -> int:
        """Pages of one adapter, by the engine's own packing."""
        ranks = tuple(
            tuple(rank if self._is_target(s.module, site) else 0 for s in site.slices) for site in self.sites
        )
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
            if self._is_target(s.module, site)
        )

    def _is_target(self, module: str, site: LoraSite) -> bool:
        if self.targets is None:
            return site.layer != MODEL_LEVEL and module not in (EMBED, HEAD)
        return module in self.targets or module.rpartition(".")[2] in self.targets


def model_facts(
    path: str,
    *,
    page_size: int = 16,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
    targets: tuple[str, ...] | None = None,
) -> ModelFacts:
    """The facts of a directory or hub id, of which only JSON files are read. Raises ConfigError for a path or a
    target that is not there, ModelUnsupported for what is not served, and for mixtures of experts, whose steps are
    not modelled."""
    model = make_model(
        path, dtype=dtype, device=torch.device("meta"), quantization=quantization, kv_cache_dtype=kv_cache_dtype
    )
    if model.config.dtype == torch.float32 and dtype == "auto":  # a GPU is meant, whose kernels are for 16 bit
        return model_facts(
            path,
            page_size=page_size,
            dtype="bfloat16",
            kv_cache_dtype=kv_cache_dtype,
            quantization=quantization,
            targets=targets,
        )
    if any(site.experts for site in model.lora_sites()):
        raise ModelUnsupported(f"plan: {path} is a mixture of experts, whose steps are not modelled")
    facts = ModelFacts(path, model, model.kv_layout(page_size), targets)
    known = {s.module.rpartition(".")[2] for site in facts.sites for s in site.slices}
    for target in targets or ():
        if target.rpartition(".")[2] not in known:
            raise ConfigError(f"--target-modules: {path} has no module {target!r}; it has {', '.join(sorted(known))}")
    return facts
