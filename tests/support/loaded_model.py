"""A model of the package with its weights, from a directory."""

from pathlib import Path

import torch

from multilora.models.base import CausalLM
from multilora.models.load import make_model


def loaded_model(
    path: Path, *, device: str = "cpu", dtype: str = "auto", load_format: str = "auto", seed: int = 0
) -> CausalLM:
    model = make_model(str(path), device=torch.device(device), dtype=dtype)
    model.load(str(path), load_format=load_format, revision=None, seed=seed)
    return model
