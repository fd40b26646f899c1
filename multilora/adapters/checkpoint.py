"""Reads an adapter directory as PEFT saved it and hands on typed blocks with every PEFT rule already applied.

Owns tensor names, shapes and scalings. What a field of the config means is in `peft_config`,
which files there are in `files`. Does not know where the directory came from (`sources/`), nor how blocks are packed.
Called by the loader process; a whole adapter is checked from headers before its first weight is read.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from multilora.adapters.adapter import Adapter, AdapterLimits, LowRank
from multilora.adapters.base_model import BaseModel
from multilora.adapters.files import INDEX_NAME, AdapterFiles, find_files, fingerprint, read_json_object, show
from multilora.adapters.peft_config import PeftConfig, parse_config
from multilora.adapters.safetensors_file import SafetensorsFile, TensorInfo
from multilora.errors import AdapterIncompatible, AdapterInvalid, AdapterUnsupported

__all__ = ["fingerprint", "read_adapter"]

PREFIX = "base_model.model."
PARENTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
# "<module>.lora_A.weight", or with the adapter's name: "<module>.lora_A.default.weight"
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
MODULE_NAME = re.compile(r"(?:model\.)?layers\.(?P<layer>[0-9]{1,6})\.(?P<parent>\w+)\.(?P<module>\w+)")
# Tensors of what is not served, by a part of their name.
UNSERVED_TENSORS = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_", "LoRA on embeddings"),
    (".modules_to_save.", "modules_to_save"),
    ("trainable_tokens_", "trainable_token_indices"),
    ("embed_tokens", "weights of embed_tokens"),
    ("lm_head", "weights of lm_head"),
    (".lora_B.bias", "a bias on lora_B (lora_bias)"),
    (".base_layer.", "weights of the base model"),
)


@dataclass
class _Pair:
    """The two tensors of one module, as the headers declare them."""

    name: str  # inside the base model
    layer: int
    module: str
    a: str | None = None
    b: str | None = None


class _Model:
    """What the base model offers LoRA, looked up once per adapter."""

    def __init__(self, base: BaseModel):
        self.shapes = base.shapes
        self.num_layers = base.num_layers
        self.order = {module: i for i, module in enumerate(self.shapes)}


class _Weights:
    """All tensors of one adapter, whether in one file or in shards."""

    def __init__(self, files: list[SafetensorsFile]):
        self._file_of = {name: file for file in files for name in file.tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def info(self, name: str) -> TensorInfo:
        return self._file_of[name].tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """In the file's dtype. It may be read-only to everybody: tensors of one file share memory."""
        return self._file_of[name].read(name)

    def where(self, name: str) -> str:
        return f"{self._file_of[name].path.name}: tensor {show(name)}"


def read_adapter(directory: Path, base: BaseModel, limits: AdapterLimits) -> Adapter:
    """The adapter in `directory`, for the model `base`.

    Raises AdapterNotFound, AdapterInvalid, AdapterUnsupported or AdapterIncompatible; the message names the file and
    the field, tensor or module.
    """
    mark = fingerprint(directory)
    files = find_files(directory)
    config = parse_config(read_json_object(files.config), files.config)
    model = _Model(base)
    with contextlib.ExitStack() as stack:
        weights = _open(files, stack)
        pairs = _pairs(weights, model)
        for pair in pairs:
            _check_pair(pair, weights, config, model)
        _check_limits(pairs, weights, limits)
        blocks = tuple(_block(pair, weights, config) for pair in pairs)
    if fingerprint(directory) != mark:
        raise AdapterInvalid(f"{show(str(directory))}: the files changed while they were read; load it again")
    return Adapter(blocks, mark)


def _open(files: AdapterFiles, stack: contextlib.ExitStack) -> _Weights:
    opened = [stack.enter_context(SafetensorsFile(path)) for path in files.weights]
    if files.shard_of is not None:
        found = {(name, file.path.name) for file in opened for name in file.tensors}
        for name, shard in sorted(found ^ set(files.shard_of.items())):
            raise AdapterInvalid(f"{INDEX_NAME}: {show(shard)} and the index disagree about tensor {show(name)}")
    return _Weights(opened)


def _pairs(weights: _Weights, model: _Model) -> list[_Pair]:
    """Every tensor has its place, every A its B; ordered by layer, then as in the model's sites."""
    pairs: dict[tuple[int, str], _Pair] = {}
    adapter_names: set[str | None] = set()
    for name in weights:
        key = LORA_KEY.fullmatch(name)
        if key is None:
            raise _left_over(name, weights)
        adapter_names.add(key["adapter"])
        if len(adapter_names) > 1:
            raise AdapterInvalid(f"{weights.where(name)}: the file holds more than one adapter")
        layer, module = _place(key["module"], weights.where(name), model)
        pair = pairs.setdefault((layer, module), _Pair(key["module"].removeprefix(PREFIX), layer, module))
        if (pair.a if key["part"] == "A" else pair.b) is not None:
            raise AdapterInvalid(f"{weights.where(name)}: module {show(pair.name)} is given twice")
        if key["part"] == "A":
            pair.a = name
        else:
            pair.b = name
    if not pairs:
        raise AdapterInvalid("the adapter holds no LoRA tensors")
    return sorted(pairs.values(), key=lambda pair: (pair.layer, model.order[pair.module]))


def _left_over(name: str, weights: _Weights) -> AdapterInvalid | AdapterUnsupported:
    for part, feature in UNSERVED_TENSORS:
        if part in name:
            return AdapterUnsupported(f"{weights.where(name)}: {feature}: not supported")
    if re.search(r"\.lora_B\.[^.]+\.bias$", name):
        return AdapterUnsupported(f"{weights.where(name)}: a bias on lora_B (lora_bias): not supported")
    if name.endswith(".bias"):
        return AdapterUnsupported(f"{weights.where(name)}: trained biases: not supported")
    return AdapterInvalid(f"{weights.where(name)}: left over: not a lora_A or lora_B weight")


def _place(module_path: str, where: str, model: _Model) -> tuple[int, str]:
    """Layer and module of a module path. Raises if the base model has no such place."""
    name = module_path.removeprefix(PREFIX)
    if name.rpartition(".")[2] in ("lm_head", "embed_tokens"):
        raise AdapterUnsupported(f"{where}: LoRA on {name.rpartition('.')[2]} is not supported")
    found = MODULE_NAME.fullmatch(name)
    if found is None or PARENTS.get(found["module"]) != found["parent"] or found["module"] not in model.shapes:
        raise AdapterIncompatible(f"{where}: the base model has no LoRA module {show(name)}")
    layer = int(found["layer"])
    if layer >= model.num_layers:
        raise AdapterIncompatible(
            f"{where}: layer {layer} is out of range, the base model has {model.num_layers} layers"
        )
    return layer, found["module"]


def _check_pair(pair: _Pair, weights: _Weights, config: PeftConfig, model: _Model) -> None:
    if pair.a is None or pair.b is None:
        have, lack = ("lora_B", "lora_A") if pair.a is None else ("lora_A", "lora_B")
        raise AdapterInvalid(f"{weights.where(pair.a or pair.b or '')}: {have} without its {lack}")
    if not config.targets(pair.name):
        raise AdapterInvalid(f"{weights.where(pair.a)}: {config.file} does not target module {show(pair.name)}")
    a, b = weights.info(pair.a).shape, weights.info(pair.b).shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise AdapterInvalid(f"{weights.where(pair.a)}: shapes {list(a)} and {list(b)} of lora_A and lora_B disagree")
    width_in, width_out = model.shapes[pair.module]
    if (a[1], b[0]) != (width_in, width_out):
        raise AdapterIncompatible(
            f"module {show(pair.name)} does not fit the base model: expected lora_A [{a[0]}, {width_in}] and lora_B "
            f"[{width_out}, {a[0]}], found {list(a)} and {list(b)}"
        )
    rank = config.rank(pair.name)
    if a[0] != rank:
        says = f"{config.file} says {rank} (r or rank_pattern)"
        raise AdapterInvalid(f"{weights.where(pair.a)}: rank {a[0]}, but {says}")


def _check_limits(pairs: list[_Pair], weights: _Weights, limits: AdapterLimits) -> None:
    rank = max(weights.info(pair.a).shape[0] for pair in pairs if pair.a)
    if limits.max_rank is not None and rank > limits.max_rank:
        raise AdapterIncompatible(
            f"the adapter is incompatible: its rank {rank} is over --max-lora-rank {limits.max_rank}"
        )
    if limits.target_modules is not None:
        beyond = sorted({pair.module for pair in pairs} - set(limits.target_modules))
        if beyond:
            raise AdapterIncompatible(
                f"the adapter is incompatible: it targets {', '.join(beyond)}, which --lora-target-modules "
                f"{' '.join(limits.target_modules)} does not allow"
            )


def _block(pair: _Pair, weights: _Weights, config: PeftConfig) -> LowRank:
    """Read both tensors, as they are stored: what is not finite in the engine's dtype is found when it is packed."""
    assert pair.a and pair.b
    a = weights.read(pair.a)  # [rank, in]
    b = weights.read(pair.b)  # [out, rank]
    return LowRank(pair.layer, pair.module, a, b.T, config.scaling(pair.name, rank=a.shape[0]))
