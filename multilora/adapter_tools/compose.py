"""`multilora adapters compose`: one adapter from several, by one of PEFT's methods, written as PEFT writes it.

A server can also compose per request, without a new adapter (docs/adapters.md); this is for those that are to be
kept, or by a method that is no sum. Called by `cli/adapter_work_commands.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from multilora.adapter_tools.combinations import combine
from multilora.adapter_tools.methods import METHODS, ON_FACTORS, RANDOM, SPARSE
from multilora.adapter_tools.pairs import LoraPair, PairedAdapter, check_new, peft_tensors, read_pairs, write_adapter
from multilora.errors import AdapterUnsupported, ConfigError


@dataclass(frozen=True)
class Composition:
    """What was written. exact: whether it computes the weighted sum; rank: of every module."""

    path: str
    method: str
    rank: int
    modules: int
    exact: bool


def compose(
    parts: Sequence[tuple[str, float]],
    out: Path,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    seed: int = 0,
    progress: bool = False,
) -> Composition:
    """Combine adapters (path or hub id, and weight). rank: of the result, for svd. Raises ConfigError for what does
    not go together, AdapterError for an adapter that cannot be read, AdapterUnsupported for one that is more than
    LoRA."""
    _check(parts, method, rank, density)
    check_new(out)
    adapters = [read_pairs(path) for path, _ in parts]
    for adapter in adapters:
        _check_plain(adapter)
    weights = [weight for _, weight in parts]
    new_rank = _rank(adapters, method, rank)
    modules = sorted(set().union(*(adapter.pairs for adapter in adapters)))
    random = torch.Generator().manual_seed(seed) if method in RANDOM else None
    pairs = {}
    for module in tqdm(modules, desc=method, unit="module", disable=not progress):
        own = [(a.pairs[module], w) for a, w in zip(adapters, weights, strict=True) if module in a.pairs]
        _check_shapes(module, [pair for pair, _ in own])
        a, b = combine(
            method,
            [pair for pair, _ in own],
            [weight for _, weight in own],
            new_rank,
            density=1.0 if density is None else density,
            sign=sign,
            random=random,
        )
        dtype = own[0][0].a.dtype
        pairs[module] = LoraPair(a.to(dtype), b.to(dtype), 1.0, own[0][0].embedding)
    write_adapter(out, _config(adapters[0], new_rank, modules), peft_tensors(pairs))
    return Composition(str(out), method, new_rank, len(pairs), method == "cat" or len(adapters) == 1)


def _config(first: PairedAdapter, rank: int, modules: Sequence[str]) -> dict[str, Any]:
    """The first adapter's, of another rank and of scaling 1: the scalings are in the matrices."""
    return first.raw | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "init_lora_weights": True,
    }


def _check(parts: Sequence[tuple[str, float]], method: str, rank: int | None, density: float | None) -> None:
    if method not in METHODS:
        raise ConfigError(f"--method must be one of {', '.join(METHODS)}, is {method!r}")
    if not parts:
        raise ConfigError("compose: no adapter given")
    if rank is not None and not method.endswith("svd"):
        raise ConfigError(f"--rank is for the methods that end in svd; that of {method} follows from the adapters")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1, is {rank}")
    if method in SPARSE and density is None:
        raise ConfigError(f"--method {method} needs --density, the part of the numbers that is kept")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"--density must be over 0 and at most 1, is {density}")


def _check_plain(adapter: PairedAdapter) -> None:
    """PEFT would combine the matrices alone and lose the rest."""
    config = adapter.config
    for field, has in (
        ("use_dora", config.use_dora),
        ("lora_bias", config.lora_bias),
        ("bias", config.bias != "none"),
        ("modules_to_save", bool(config.modules_to_save)),
        ("trainable_token_indices", bool(config.token_indices)),
        ("alora_invocation_tokens", config.invocation_tokens is not None),
        ("target_parameters", bool(config.target_parameters)),
    ):
        if has:
            raise AdapterUnsupported(f"{adapter.path}: {field}: only adapters of nothing but LoRA can be composed")
    if adapter.others:
        raise AdapterUnsupported(f"{adapter.path}: {next(iter(adapter.others))} is no part of LoRA")


def _check_shapes(module: str, pairs: Sequence[LoraPair]) -> None:
    shapes = {(pair.a.shape[1], pair.b.shape[0], pair.embedding) for pair in pairs}
    if len(shapes) > 1:
        raise ConfigError(f"compose: {module} has different widths in the adapters: they are for different models")


def _rank(adapters: Sequence[PairedAdapter], method: str, rank: int | None) -> int:
    largest = [max(pair.rank for pair in adapter.pairs.values()) for adapter in adapters]
    if method == "cat":
        return sum(largest)
    if method in ON_FACTORS and len({pair.rank for adapter in adapters for pair in adapter.pairs.values()}) > 1:
        ranks = ", ".join(map(str, largest))
        raise ConfigError(f"--method {method} needs adapters of one rank, these have {ranks}: take cat or svd")
    return rank or max(largest)
