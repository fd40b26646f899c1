"""`adapter_config.json` as PEFT writes it, checked, with PEFT's rules for what a config means for a module.

Which fields there may be is in `fields.py`, how patterns match in `match.py`. This file knows nothing of tensors.
Module names are those inside the base model: "model.layers.0.self_attn.q_proj". Called by `checkpoint.py`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.fields import Fields
from multilora.adapters.peft.match import (
    PatternError,
    belongs_to,
    is_part_of,
    layer_index,
    matches_modules,
    pattern_key,
)
from multilora.adapters.sources.files import show
from multilora.errors import AdapterIncompatible, AdapterInvalid
from multilora.lora.sites import EMBED, HEAD, TABLES

ANY_MODULE = ".*"
"""The targets of a config that says null: the modules that the file has tensors of. PEFT writes what it has resolved,
so only other trainers write null; PEFT would read it as a default by model family and drop the other tensors."""


@dataclass(frozen=True)
class PeftConfig:
    """The fields that decide the arithmetic."""

    file: str  # for messages
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    use_dora: bool
    bias: str
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    token_indices: dict[str, tuple[int, ...]] | None
    ensure_weight_tying: bool
    invocation_tokens: tuple[int, ...] | None
    velora: bool
    target_parameters: tuple[str, ...] = ()

    def rank(self, name: str) -> int:
        """The rank that PEFT would give module `name`."""
        key = self._pattern_key("rank_pattern", self._key(name))
        return self.r if key is None else self.rank_pattern[key]

    def scaling(self, name: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        key = self._pattern_key("alpha_pattern", self._key(name))
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _key(self, name: str) -> str:
        """What the patterns are held against: PEFT's name of the module, or of its weight if it wraps that."""
        weight = f"{name}.weight"
        return weight if self.targets_parameter(weight) else name

    def targets_parameter(self, name: str) -> bool:
        """Whether PEFT would wrap the parameter `name`: "model.layers.0.mlp.experts.down_proj"."""
        return any(name == entry or name.endswith(f".{entry}") for entry in self.target_parameters)

    def targets(self, name: str, base: BaseModel) -> bool:
        """Whether PEFT would put LoRA on module `name`, which is a linear layer or the token embedding."""
        if self.targets_parameter(f"{name}.weight"):
            return True
        if base.is_table(name) and self.ties_targets(base):
            return True
        with self._patterns("target_modules, exclude_modules, layers_pattern or modules_to_save"):
            if self.exclude_modules and matches_modules(self.exclude_modules, name):
                return False
            if any(is_part_of(entry, name) for entry in self.modules_to_save):
                return False
            if isinstance(self.target_modules, str):
                if self.target_modules.lower() == "all-linear":
                    return not base.is_table(name)
                return matches_modules(self.target_modules, name)
            if name in self.target_modules:
                return True
            if not matches_modules(self.target_modules, name):
                return False
            return self.layers_to_transform is None or (
                layer_index(self.layers_pattern, name) in self.layers_to_transform
            )

    def saves(self, name: str, base: BaseModel) -> bool:
        """Whether modules_to_save means module `name` or one that it is part of."""
        if base.is_table(name) and self.ties_saved(base):
            return True
        return any(belongs_to(entry, name) for entry in self.modules_to_save)

    def tokens(self, base: BaseModel) -> dict[str, tuple[int, ...]]:
        """embed_tokens, lm_head → the token ids whose rows were trained, in the order of the file's rows.

        Raises AdapterInvalid or AdapterIncompatible for what PEFT would not load.
        """
        found: dict[str, tuple[int, ...]] = {}
        for entry, ids in (self.token_indices or {}).items():
            modules = [m for m, path in base.table_paths.items() if entry and path.endswith(entry)]
            if not modules and entry == EMBED:
                modules = [EMBED]  # what a list of ids without a module means, whatever the embedding is called
            if len(modules) != 1:
                what = f"{show(entry)} is neither {EMBED} nor {HEAD} of the base model"
                raise AdapterIncompatible(f"{self.file}: trainable_token_indices: {what}")
            if modules[0] in found:
                raise AdapterInvalid(f"{self.file}: trainable_token_indices: {modules[0]} is given twice")
            found[modules[0]] = ids
        if self.ensure_weight_tying and base.tie_word_embeddings and len(set(found.values())) > 1:
            raise AdapterInvalid(
                f"{self.file}: trainable_token_indices: {EMBED} and {HEAD} differ, but ensure_weight_tying is true"
            )
        return found

    def ties_tokens(self, base: BaseModel) -> bool:
        """Whether the rows trained for embed_tokens act in lm_head too."""
        found = self.tokens(base)
        return base.tie_word_embeddings and EMBED in found and found.get(HEAD, found[EMBED]) == found[EMBED]

    def ties_saved(self, base: BaseModel) -> bool:
        """Whether PEFT saves embed_tokens and lm_head as one module."""
        return self.ensure_weight_tying and base.tie_word_embeddings and self._saves_a_table

    def ties_targets(self, base: BaseModel) -> bool:
        """Whether PEFT puts LoRA on embed_tokens and, transposed, on lm_head."""
        tied = self.ensure_weight_tying and base.tie_word_embeddings
        return tied and not self._saves_a_table and self._targets_a_table

    @cached_property
    def _saves_a_table(self) -> bool:
        return any(entry.rpartition(".")[2] in TABLES for entry in self.modules_to_save)

    @cached_property
    def _targets_a_table(self) -> bool:
        if isinstance(self.target_modules, str):
            with self._patterns("target_modules"):
                return any(matches_modules(self.target_modules, table) for table in TABLES)
        return any(entry.rpartition(".")[2] in TABLES for entry in self.target_modules)

    def _pattern_key(self, field: str, name: str) -> str | None:
        patterns = getattr(self, field)
        if not patterns:
            return None
        with self._patterns(field):
            return pattern_key(patterns, name)

    @contextmanager
    def _patterns(self, fields: str) -> Iterator[None]:
        try:
            yield
        except PatternError as e:
            raise AdapterInvalid(f"{self.file}: {fields}: {e}") from None


def parse_config(raw: dict[str, Any], path: Path) -> PeftConfig:
    """Check every field. Raises AdapterInvalid naming file and field, AdapterUnsupported naming the feature."""
    fields = Fields(path.name, raw)
    fields.check_known()
    fields.check_init()
    unsaid = raw.get("target_modules", "") is None
    parameters = fields.names("target_parameters")
    targets = ANY_MODULE if unsaid else fields.modules("target_modules", required=not parameters)
    layers = fields.layers()
    layers_pattern = fields.modules("layers_pattern")
    if isinstance(targets, str) and (layers is not None or layers_pattern):
        raise fields.invalid("layers_to_transform", "cannot be used when target_modules is a string")
    if layers_pattern and layers is None:
        raise fields.invalid("layers_pattern", "needs layers_to_transform")
    config = PeftConfig(
        file=path.name,
        r=fields.rank("r", raw.get("r")),
        lora_alpha=fields.alpha("lora_alpha", raw.get("lora_alpha")),
        use_rslora=fields.flag("use_rslora"),
        rank_pattern={
            k: fields.rank(f"rank_pattern[{show(k)}]", v) for k, v in fields.mapping("rank_pattern").items()
        },
        alpha_pattern={
            k: fields.alpha(f"alpha_pattern[{show(k)}]", v) for k, v in fields.mapping("alpha_pattern").items()
        },
        target_modules=targets,
        exclude_modules=fields.modules("exclude_modules"),
        layers_to_transform=layers,
        layers_pattern=(layers_pattern,)
        if isinstance(layers_pattern, str) and layers_pattern
        else tuple(layers_pattern),
        use_dora=fields.flag("use_dora"),
        bias=fields.bias(),
        lora_bias=fields.flag("lora_bias"),
        modules_to_save=fields.names("modules_to_save"),
        token_indices=fields.token_indices(),
        ensure_weight_tying=fields.flag("ensure_weight_tying"),
        invocation_tokens=fields.integers("alora_invocation_tokens", raw.get("alora_invocation_tokens") or [])
        or None,
        velora=bool(raw.get("velora_config")),
        target_parameters=parameters,
    )
    _check_combinations(config, fields)
    return config


def _check_combinations(config: PeftConfig, fields: Fields) -> None:
    """Refuse combinations that PEFT itself does not load. Raises AdapterInvalid."""
    if "" in config.modules_to_save:
        raise fields.invalid("modules_to_save", "a name is empty")
    variants = {
        "use_dora": config.use_dora,
        "alora_invocation_tokens": config.invocation_tokens,
        "velora_config": config.velora,
        "init_lora_weights 'mica'": fields.raw.get("init_lora_weights") == "mica",
    }
    used = [name for name, on in variants.items() if on]
    if len(used) > 1:
        raise fields.invalid(used[0], f"cannot be combined with {used[1]}")
    for name, on in {**variants, "lora_bias": config.lora_bias}.items():
        if config.target_parameters and on:
            raise fields.invalid("target_parameters", f"cannot be combined with {name}")
    if config.lora_bias and config.use_dora:
        raise fields.invalid("lora_bias", "cannot be combined with use_dora")
