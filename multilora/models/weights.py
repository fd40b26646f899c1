"""Fill a model from safetensors, one tensor at a time, or with seeded noise.

Owns the correspondence of names: a merged linear layer is filled slice by slice. Nothing is left to chance: every
parameter must be filled, every tensor used or known to be superfluous, every shape equal. Called by `load.py`.
"""

import json
import logging
import re
import time
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.linear import Linear

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SUPERFLUOUS = re.compile(r"\.rotary_emb\.inv_freq$")  # written by old exporters, derived from the config
FLOATS = ("F64", "F32", "BF16", "F16")


def load_weights(model: nn.Module, model_path: str, revision: str | None = None) -> None:
    """Fill every parameter from the checkpoint of a local directory or hub id.

    Raises ModelUnsupported naming the tensor that is missing, left over or misshapen, before any is copied;
    ConfigError for a missing or broken file.
    """
    began = time.monotonic()
    files = checkpoint_files(model_path, revision)
    targets = destinations(model)
    wanted = _check(files, targets)
    total = sum(targets[name].nbytes for names in wanted.values() for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights") as bar:
        for file, names in wanted.items():
            with _open(file) as tensors:
                for name in names:
                    targets[name].copy_(tensors.get_tensor(name))
                    bar.update(targets[name].nbytes)
    logger.info("weights: %.2f GB in %.1f s from %d file(s)", total / 1e9, time.monotonic() - began, len(files))


@torch.no_grad()
def fill_dummy(model: nn.Module, seed: int = 0) -> None:
    """Small seeded noise, made on the device: for benchmarks without a checkpoint."""
    params = list(model.parameters())
    generator = torch.Generator(params[0].device).manual_seed(seed)
    for param in params:
        if param.dim() == 1:
            param.fill_(1.0)  # norms; a bias of one does no harm
        else:
            param.normal_(std=0.02, generator=generator)
    logger.info("weights: random (load format dummy)")


def destinations(model: nn.Module) -> dict[str, torch.Tensor]:
    """Checkpoint tensor name → the memory it belongs in. Tied parameters appear once, under the embedding's name."""
    found: dict[str, torch.Tensor] = {}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            parent = path.rpartition(".")[0]
            for part, params in module.parts().items():
                found |= {f"{parent}.{part}.{name}": rows for name, rows in params.items()}
        else:
            own = {f"{path}.{n}": p for n, p in module.named_parameters(recurse=False) if p not in seen}
            seen.update(module.parameters(recurse=False))
            found.update(own)
    return found


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


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise ConfigError(f"{file} is not a readable safetensors file: {e}") from e


def _check(files: list[Path], targets: dict[str, torch.Tensor]) -> dict[Path, list[str]]:
    """Compare the files' headers with what the model needs. Returns the tensors to copy from each file."""
    wanted: dict[Path, list[str]] = {}
    left = set(targets)
    extra: list[str] = []
    for file in files:
        wanted[file] = []
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a dict
                if name in targets:
                    _check_tensor(name, tensors.get_slice(name), targets[name])
                    wanted[file].append(name)
                    left.discard(name)
                elif not (SUPERFLUOUS.search(name) or name == "lm_head.weight"):
                    extra.append(name)
    if left:
        raise ModelUnsupported(f"the checkpoint lacks {_some(left)}")
    if extra:
        raise ModelUnsupported(f"the checkpoint holds {_some(extra)}, which the model would not use")
    return wanted


def _check_tensor(name: str, found: object, target: torch.Tensor) -> None:
    shape, dtype = tuple(found.get_shape()), found.get_dtype()  # type: ignore[attr-defined]
    if shape != tuple(target.shape):
        raise ModelUnsupported(f"tensor {name} has shape {list(shape)}, the config asks for {list(target.shape)}")
    if dtype not in FLOATS:
        raise ModelUnsupported(f"tensor {name} is {dtype}: quantized checkpoints are not supported")


def _some(names: "set[str] | list[str]") -> str:
    first = sorted(names)[:3]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
