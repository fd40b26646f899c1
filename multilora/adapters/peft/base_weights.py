"""The base model's own tensors, as its checkpoint holds them, for comparing with copies that an adapter brings.

Unlike an adapter's, these files are trusted: the engine has just loaded them. Called by `checkpoint_full_weights.py`.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from multilora.errors import AdapterError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROWS = 1 << 12  # of a table at a time


def differing_rows(weight: torch.Tensor, names: tuple[str, ...], directory: str) -> list[int]:
    """In which rows `weight` [rows, columns] is another than the first of `names` that the base model has.

    Raises AdapterError if the base model's files cannot be read any more.
    """
    found: list[int] = []
    try:
        file, name = _find(names, Path(directory))
        with safe_open(file, framework="pt", device="cpu") as tensors:
            base = tensors.get_slice(name)
            for start in range(0, len(weight), ROWS):
                other = base[start : start + ROWS].float() != weight[start : start + ROWS].float()
                found += (other.any(dim=1).nonzero()[:, 0] + start).tolist()
    except (OSError, SafetensorError, ValueError, KeyError) as e:
        raise AdapterError(f"the base model in {directory} cannot be read for a comparison: {e}") from None
    return found


def _find(names: tuple[str, ...], directory: Path) -> tuple[Path, str]:
    index = directory / INDEX
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(directory / SINGLE, framework="pt", device="cpu") as tensors:
            files = dict.fromkeys(tensors.keys(), SINGLE)
    for name in names:
        if name in files:
            return directory / files[name], name
    raise KeyError(names[0])
