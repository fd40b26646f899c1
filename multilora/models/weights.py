"""Fill a model from safetensors, one tensor at a time, or with seeded noise.

Owns the correspondence of names: a merged linear layer is filled slice by slice, and a rank of a group reads only the
part of each tensor that it holds. Nothing is left to chance: every parameter must be filled, every tensor used or
known to be superfluous, every shape equal. Called by `base.py`.
"""

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from multilora.distributed.partition import padded_part
from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.embedding import Embedding, LMHead
from multilora.layers.experts import Experts
from multilora.layers.linear import Linear
from multilora.layers.weights.base import FLOATS, ExpertsWeight, Stored, Weight
from multilora.layers.weights.plain import NOISE
from multilora.lora.sites import HEAD, Shard

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INNER = "model."
"""What the names of a decoder's tensors begin with inside a causal LM."""
NOTHING = (range(0),)
"""The part of a tensor of which a rank holds nothing."""
Part = tuple[range | tuple[range, ...], ...]
"""Which part of a tensor, by its dimensions; several ranges of one come to lie behind each other."""
SUPERFLUOUS = re.compile(r"\.rotary_emb\.inv_freq$")  # written by old exporters, derived from the config


def load_weights(
    model: nn.Module,
    model_path: str,
    revision: str | None = None,
    older_names: tuple[tuple[str, str], ...] = (),
    others: Mapping[str, "Destination"] | None = None,
) -> None:
    """Fill every parameter from the checkpoint of a local directory or hub id. older_names: see `CausalLM`; others:
    of tensors that are no parameters.

    Raises ModelUnsupported naming the tensor that is missing, left over or misshapen, before any is copied;
    ConfigError for a missing or broken file.
    """
    began = time.monotonic()
    files = checkpoint_files(model_path, revision)
    targets = destinations(model) | dict(others or {})
    wanted = _check(files, targets, older_names)
    total, nbytes = sum(len(found) for found in wanted.values()), 0
    with tqdm(total=total, unit=" tensors", desc="Loading weights") as bar:
        for file, names in wanted.items():
            with open_file(file) as tensors:
                for name, ours in names:
                    tensor = targets[ours].read(tensors, name)
                    targets[ours].load(tensor)
                    bar.update()
                    nbytes += tensor.nbytes
    check_filled(model)
    logger.info("weights: %.2f GB in %.1f s from %d file(s)", nbytes / 1e9, time.monotonic() - began, len(files))


@torch.no_grad()
def fill_dummy(
    model: nn.Module, seed: int = 0, rank: int = 0, divided: Collection[nn.Parameter] = frozenset()
) -> None:
    """Small seeded noise, made on the device: for benchmarks without a checkpoint. What all ranks hold whole is the
    same on all of them. divided: parameters that they do not, beside those of our modules."""
    params = list(model.parameters())
    of_rank, of_all = (torch.Generator(params[0].device).manual_seed(seed + n) for n in (1 + rank, 0))
    own: set[nn.Parameter] = set()
    parts = set(divided)
    for module in model.modules():
        if isinstance(module, Embedding | LMHead | Experts):
            parts.update(module.parameters())
        if isinstance(module, Linear):
            whole = all(part.shard is Shard.REPLICATED for part in module.site.slices)
            module.weight.randomise(of_all if whole else of_rank)
            own.update(module.weight.parameters())
        elif isinstance(module, ExpertsWeight):
            module.randomise(of_rank)
            own.update(module.parameters())
    for param in params:
        if param in own:
            continue
        if param.dim() == 1:
            param.fill_(1.0)  # norms; a bias of one does no harm
        else:
            param.normal_(std=NOISE, generator=of_rank if param in parts else of_all)
    logger.info("weights: random (load format dummy)")


@dataclass(frozen=True)
class Destination:
    """Where one tensor of a checkpoint goes: the shape and the dtypes that it must have (see `Stored`), what copies
    it to its memory, and which part this rank holds (rows, then columns; empty: all of it).

    instead_of: names of tensors that a checkpoint may have in its place; together they fill the same memory.
    """

    shape: tuple[int, ...] | None
    load: Callable[[torch.Tensor], object]
    part: Part = ()
    dtypes: tuple[str, ...] = FLOATS
    optional: bool = False
    instead_of: tuple[str, ...] = ()

    @property
    def held_shape(self) -> tuple[int, ...] | None:
        """The shape of the part."""
        if not self.part:
            return self.shape
        return tuple(len(p) if isinstance(p, range) else sum(map(len, p)) for p in self.part)

    def read(self, tensors: Any, name: str) -> torch.Tensor:
        """The part that this rank holds; no other byte is read. tensors: an open safetensors file."""
        if self.part == NOTHING:
            return torch.empty(0)
        if self.held_shape == self.shape:
            tensor: torch.Tensor = tensors.get_tensor(name)
            return tensor
        return take(tensors.get_slice(name), self.part)


def take(tensor: Any, part: Part) -> torch.Tensor:
    """A part of a tensor, or of a slice that safetensors opens without reading it. Empty: all of it."""
    for dim, ranges in enumerate(part):
        if isinstance(ranges, tuple):
            return torch.cat([take(tensor, (*part[:dim], one, *part[dim + 1 :])) for one in ranges], dim)
    found: torch.Tensor = tensor[tuple(slice(p.start, p.stop) for p in part if isinstance(p, range))]
    return found


def destinations(model: nn.Module) -> dict[str, Destination]:
    """Checkpoint tensor name → where it goes. Tied parameters appear once, under the embedding's name."""
    found: dict[str, Destination] = {}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        if isinstance(module, Linear | Experts):
            found |= _of_linear(path, module) if isinstance(module, Linear) else _of_experts(path, module)
            seen.update(module.parameters())
        elif isinstance(module, Embedding | LMHead) and module.weight not in seen:
            found[f"{path}.weight"] = _of_table(module)
            seen.add(module.weight)
        for name, param in module.named_parameters(recurse=False):
            if param not in seen:
                found[f"{path}.{name}"] = Destination(tuple(param.shape), param.copy_)
                seen.add(param)
    return found


def _of_linear(path: str, linear: Linear) -> dict[str, Destination]:
    """Checkpoints have the slices of a merged layer as modules of their own, beside each other in its parent."""
    parent = path.rpartition(".")[0]
    found = {}
    for part in linear.site.slices:
        at = path if len(linear.site.slices) == 1 else f"{parent}.{part.attribute or part.module}"
        for name, stored in linear.tensors(part).items():
            found[f"{at}.{name}"] = Destination(
                stored.shape, partial(linear.load, part, name), stored.part, stored.dtypes, stored.optional
            )
    return found


def _of_experts(path: str, experts: Experts) -> dict[str, Destination]:
    """Checkpoints have three matrices for each expert, or two tensors for all of them, in 16 or 32 bit."""
    found: dict[str, Destination] = {}
    for name, weight in (("gate_up_proj", experts.gate_up_proj), ("down_proj", experts.down_proj)):
        modules = {m: experts.tensors(m) for m, (place, _) in experts.places.items() if place is weight}
        single = {
            f"{path}.{number}.{module}.{leaf}": _of_expert(experts, number, module, leaf, stored)
            for number in range(experts.count)
            for module, tensors in modules.items()
            for leaf, stored in tensors.items()
        }
        found |= single
        if all(one.dtypes == FLOATS and at.endswith(".weight") for at, one in single.items()):
            size = weight.height, weight.width
            part = (experts.held, *map(range, size))
            load = partial(_load_stack, weight)
            found[f"{path}.{name}"] = Destination((experts.count, *size), load, part, instead_of=tuple(single))
    return found


def _of_expert(experts: Experts, number: int, module: str, leaf: str, stored: Stored) -> Destination:
    """Where one tensor of one expert goes: nowhere, if another rank holds the expert."""
    if number not in experts.held:
        return Destination(stored.shape, _leave, NOTHING, stored.dtypes, stored.optional)
    load = partial(experts.load, number, module, leaf)
    return Destination(stored.shape, load, stored.part, stored.dtypes, stored.optional)


def _load_stack(weight: ExpertsWeight, stack: torch.Tensor) -> None:
    """Fill the weight from [experts, out, in]."""
    for expert, matrix in enumerate(stack):
        weight.load(weight.rows_of(expert), "weight", matrix)


def _leave(tensor: torch.Tensor) -> None:
    """Take nothing of a tensor of which this rank holds nothing."""
    assert not tensor.numel()


def _of_table(table: Embedding | LMHead) -> Destination:
    """A rank's rows of the table come first in its memory, then zeros up to the size that all ranks have."""
    group, weight = table.group, table.weight
    site = table.whole
    vocab = site.in_features if isinstance(table, Embedding) else site.out_features
    hidden = weight.shape[1]

    def load(rows: torch.Tensor) -> None:
        weight[: len(rows)].copy_(rows)
        weight[len(rows) :].zero_()

    return Destination((vocab, hidden), load, (padded_part(vocab, group.rank, group.size), range(hidden)))


def checkpoint_files(model_path: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model, fetched from the hub if `model_path` is no directory."""
    if not Path(model_path).is_dir():
        return _fetch(model_path, revision)
    root = Path(model_path)
    if (root / INDEX).is_file():
        return _shards(root)
    if (root / SINGLE).is_file():
        return [root / SINGLE]
    raise ConfigError(f"--model-path {model_path}: neither {SINGLE} nor {INDEX} is there")


def _fetch(repo: str, revision: str | None) -> list[Path]:
    try:
        try:
            root = Path(hf_hub_download(repo, INDEX, revision=revision)).parent
        except EntryNotFoundError:
            return [Path(hf_hub_download(repo, SINGLE, revision=revision))]
        names = [f.name for f in _shards(root, must_exist=False)]
        snapshot_download(repo, revision=revision, allow_patterns=names)
        return _shards(root)
    except (OSError, EntryNotFoundError) as e:
        raise ConfigError(f"--model-path {repo}: its safetensors weights cannot be fetched: {e}") from e


def _shards(root: Path, must_exist: bool = True) -> list[Path]:
    """The files that the index of a sharded checkpoint lists."""
    try:
        names = sorted(set(json.loads((root / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as e:
        raise ConfigError(f"{root / INDEX} is not a valid safetensors index: {e!r}") from e
    for name in names:
        if must_exist and not (root / name).is_file():
            raise ConfigError(f"{root / INDEX} lists {name}, which is not there")
    return [root / name for name in names]


def open_file(file: Path) -> safe_open:
    """Open one file of a checkpoint. Raises ConfigError if it is broken."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise ConfigError(f"{file} is not a readable safetensors file: {e}") from e


def _check(
    files: list[Path], targets: dict[str, Destination], older_names: tuple[tuple[str, str], ...]
) -> dict[Path, list[tuple[str, str]]]:
    """Compare the files' headers with what the model needs. Returns the tensors to copy from each file, by the name
    that they have there and the one that they have here."""
    wanted: dict[Path, list[tuple[str, str]]] = {}
    extra: list[str] = []
    for file in files:
        wanted[file] = []
        with open_file(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a dict
                ours = _renamed(name, older_names)
                if ours not in targets and f"{INNER}{ours}" in targets:
                    ours = f"{INNER}{ours}"  # a checkpoint of the decoder alone
                if ours in targets:
                    check_tensor(name, tensors.get_slice(name), targets[ours])
                    wanted[file].append((name, ours))
                elif not (SUPERFLUOUS.search(name) or name == f"{HEAD}.weight"):
                    extra.append(name)
    _check_complete([ours for found in wanted.values() for _, ours in found], targets)
    if extra:
        raise ModelUnsupported(f"the checkpoint holds {some(extra)}, which the model would not use")
    return wanted


def _renamed(name: str, older_names: tuple[tuple[str, str], ...]) -> str:
    for old, new in older_names:
        name = name.replace(old, new)
    return name


def _check_complete(found: list[str], targets: dict[str, Destination]) -> None:
    """Raise ModelUnsupported unless every parameter is filled, and none twice."""
    filled = Counter(found)
    for name in found:
        filled.update(targets[name].instead_of)
    if twice := [name for name, count in filled.items() if count > 1]:
        raise ModelUnsupported(f"the checkpoint holds {some(twice)} twice")
    if left := {name for name, to in targets.items() if not (to.instead_of or to.optional)} - filled.keys():
        raise ModelUnsupported(f"the checkpoint lacks {some(left)}")


def check_tensor(name: str, found: Any, target: Destination) -> None:
    """Compare a tensor with what the model needs. found: the slice that safetensors opens without reading it.

    Raises ModelUnsupported.
    """
    shape, dtype = tuple(found.get_shape()), found.get_dtype()
    if target.shape is not None and shape != target.shape:
        raise ModelUnsupported(f"tensor {name} has shape {list(shape)}, the config asks for {list(target.shape)}")
    if dtype not in target.dtypes and target.dtypes == FLOATS:
        raise ModelUnsupported(f"tensor {name} is {dtype}: it can be served in 16 or 32 bit, not quantised")
    if dtype not in target.dtypes:
        raise ModelUnsupported(f"tensor {name} is {dtype}, the config asks for {' or '.join(target.dtypes)}")


def check_filled(model: nn.Module) -> None:
    """Raise ModelUnsupported naming the layer that the checkpoint has not given all of its weight."""
    for path, module in model.named_modules():
        if isinstance(module, Weight):
            try:
                module.check_filled()
            except ModelUnsupported as e:
                raise ModelUnsupported(f"{path.removesuffix('.weight')}: {e.message}") from None


def some(names: "set[str] | list[str]") -> str:
    """The first three of them, and how many more there are."""
    first = sorted(names)[:3]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
