"""What an adapter's files say: its method, and rank and scaling of each module.

It reads the config leniently, and only the headers of the weights, so that it can also describe adapters that are not
served. Whether one can be served is decided by `adapters/peft/checkpoint.py`, not here. Called by `inspect.py`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from multilora.adapters.peft.config import PeftConfig
from multilora.adapters.peft.safetensors_file import TensorInfo
from multilora.errors import MultiloraError

PREFIX = "base_model.model."
LORA = "LoRA"
LORA_A = re.compile(r"\.lora_(?:embedding_)?A(?:\.|$)")
WRAPPER = re.compile(r"\.experts(?:\.base_layer)*$")
LAYER = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.(?:.*\.)?(?P<leaf>[^.]+)$")
# Kinds of tensors, by the end of their names; the first that matches counts. The adapter's own name may be in
# between.
KINDS = (
    (LORA, r"\.lora_(?:A|B)(?:\.[^.]+)?\.weight|\.lora_embedding_(?:A|B)(?:\.[^.]+)?"),
    ("DoRA magnitude", r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?"),
    ("bias of lora_B", r"\.lora_B(?:\.[^.]+)?\.bias"),
    ("trained tokens", r"(?:\.token_adapter)?\.trainable_tokens_(?:delta|original)(?:\.[^.]+)?"),
    ("bias", r"(?:\.base_layer)?\.bias"),
    ("whole weight", r"(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.weight"),
)


@dataclass(frozen=True)
class Row:
    """Modules for which the file holds the same. layers: "0-15, 20", or "" if they are in no layer."""

    kind: str
    modules: list[str]
    layers: str
    rank: int | None
    scaling: float | None
    parameters: int


def method(raw: Mapping[str, Any]) -> str:
    """The adapter's method, such as `rsLoRA + DoRA`, from the config alone."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        return str(kind)[:100]
    found = ["rsLoRA" if raw.get("use_rslora") is True else "LoRA"]
    if raw.get("use_dora"):
        found.append("DoRA")
    if raw.get("alora_invocation_tokens"):
        found.append("activated")
    if raw.get("bias") in ("all", "lora_only"):
        found.append(f"biases ({raw['bias']})")
    further = "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"
    found.extend(field for field in further if raw.get(field))
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() != "gaussian":
        found.append(f"initialised by {init[:40]}")
    return " + ".join(found)


@dataclass(frozen=True)
class _Key:
    """What modules of one row of the table have in common."""

    kind: str
    rank: int | None
    scaling: float | None


def rows(tensors: Mapping[str, TensorInfo], config: PeftConfig | None) -> list[Row]:
    """The table: one row for modules of the same kind, rank and scaling that are in the same layers.

    config: None if it cannot be read; then no scaling is known.
    """
    ranks = _ranks(tensors, config)
    layers: dict[tuple[_Key, str], set[int]] = {}  # by key and module
    sizes: dict[tuple[_Key, str], int] = {}
    for name, info in tensors.items():
        kind, module = _kind(name)
        rank = ranks.get(module) if kind == LORA else None
        layer, leaf = _layer_and_leaf(module)
        entry = _Key(kind, rank, _scaling(config, module, rank)), leaf
        layers.setdefault(entry, set()).update([] if layer is None else [layer])
        sizes[entry] = sizes.get(entry, 0) + info.nbytes // info.dtype.itemsize
    merged: dict[tuple[_Key, frozenset[int]], list[str]] = {}
    for (key, leaf), at in layers.items():
        merged.setdefault((key, frozenset(at)), []).append(leaf)
    order = [kind for kind, _ in KINDS]
    found = [
        Row(k.kind, sorted(leaves), ranges(at), k.rank, k.scaling, sum(sizes[k, leaf] for leaf in leaves))
        for (k, at), leaves in merged.items()
    ]
    return sorted(found, key=lambda row: order.index(row.kind) if row.kind in order else len(order))


def ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 3, 7} → "0-3, 7"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _ranks(tensors: Mapping[str, TensorInfo], config: PeftConfig | None) -> dict[str, int]:
    """Module → rank, which is the number of rows of its A. Where that holds all experts of a layer, it is the last
    but one size of a stack; a wrapper's is told by the config alone."""
    found = {}
    for name, info in tensors.items():
        if LORA_A.search(name) and info.shape:
            module = _kind(name)[1]
            if not WRAPPER.search(module):
                found[module] = info.shape[-2] if len(info.shape) == 3 else info.shape[0]
            elif config is not None:
                found[module] = config.r
    return found


def _kind(name: str) -> tuple[str, str]:
    """The kind of a tensor, and its module's path in the base model."""
    for kind, ending in KINDS:
        if found := re.fullmatch(f"(.+?)(?:{ending})", name):
            return kind, found[1].removeprefix(PREFIX)
    return "unknown", name.removeprefix(PREFIX)


def _layer_and_leaf(module: str) -> tuple[int | None, str]:
    """The layer and the last component of a path; None and the full path if it is in no layer."""
    found = LAYER.search(module)
    return (int(found["layer"]), found["leaf"]) if found else (None, module.removeprefix("model."))


def _scaling(config: PeftConfig | None, module: str, rank: int | None) -> float | None:
    if config is None or not rank:
        return None
    try:
        return config.scaling(module, rank)
    except MultiloraError:  # a broken pattern: reported when the adapter is read
        return None
