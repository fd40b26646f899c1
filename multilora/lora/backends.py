"""LoRA backends by name. A new one is a function and a line in `BACKENDS`. Called by `engine/build.py`."""

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import partial

import torch

from multilora.errors import ConfigError
from multilora.lora.base import LoraBackend
from multilora.lora.sites import LoraSite
from multilora.lora.table import LoraTable
from multilora.lora.torch_backend import TorchLora

logger = logging.getLogger(__name__)

Sites = tuple[LoraSite, ...]


def _torch(table: LoraTable, _sites: Sites, _chunk_rows: int) -> LoraBackend:
    return TorchLora(table)


def _triton(name: str, table: LoraTable, sites: Sites, chunk_rows: int) -> LoraBackend:
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"--lora-backend {name} needs Triton, which is not installed (pip install triton)")
    device = table.weights.device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"--lora-backend {name} needs a CUDA device, this is {device.type}; torch runs anywhere")
    from multilora.lora.triton_backend import MAX_TILE_ROWS, TritonLora

    if chunk_rows > MAX_TILE_ROWS:
        logger.warning("--max-lora-chunk-size %d: %d is used, larger chunks are slower", chunk_rows, MAX_TILE_ROWS)
    return TritonLora(table, sites, name=name, chunk_rows=chunk_rows)


BACKENDS: dict[str, Callable[[LoraTable, Sites, int], LoraBackend]] = {
    "torch": _torch,
    "triton": partial(_triton, "triton"),
    "csgmv": partial(_triton, "csgmv"),
}


def make_lora_backend(
    name: str, table: LoraTable, device: torch.device, *, sites: Sites, chunk_rows: int = 32
) -> LoraBackend:
    """The backend `name` over `table`; `auto` is the best that `device` can run, and is logged.

    chunk_rows: --max-lora-chunk-size. Raises ConfigError for an unknown name and for what cannot run here.
    """
    if name == "auto":
        name = "csgmv" if device.type == "cuda" else "torch"
        logger.info("LoRA backend: %s (chosen for %s)", name, device.type)
    if name not in BACKENDS:
        raise ConfigError(f"--lora-backend {name} is not available; there are: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](table, sites, chunk_rows)
