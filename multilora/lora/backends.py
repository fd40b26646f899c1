"""LoRA backends by name. A new one is a function and a line in `BACKENDS`.

The table is also where `--lora-backend` finds its choices, so this file imports no heavy library.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from multilora.errors import ConfigError
from multilora.lora.sites import LoraSite

if TYPE_CHECKING:
    import torch

    from multilora.lora.base import LoraBackend
    from multilora.lora.table import LoraTable

logger = logging.getLogger(__name__)

Sites = tuple[LoraSite, ...]


def _torch(table: "LoraTable", _sites: Sites, _dtype: "torch.dtype", _chunk_rows: int) -> "LoraBackend":
    from multilora.lora.torch_backend import TorchLora

    return TorchLora(table)


def _cpp(table: "LoraTable", sites: Sites, dtype: "torch.dtype", _chunk_rows: int) -> "LoraBackend":
    device = table.weights.device.type
    if (obstacle := _cpp_obstacle(device, table.weights.dtype, dtype)) is not None:
        raise ConfigError(f"--lora-backend cpp: {obstacle}; torch runs anywhere")
    from multilora.lora.cpp_backend import CppLora

    return CppLora(table, len(sites))


def _triton(name: str, table: "LoraTable", sites: Sites, dtype: "torch.dtype", chunk_rows: int) -> "LoraBackend":
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"--lora-backend {name} needs Triton, which is not installed (pip install triton)")
    device = table.weights.device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"--lora-backend {name} needs a CUDA device, this is {device.type}; torch runs anywhere")
    if table.weights.dtype != dtype:
        raise ConfigError(
            f"--lora-backend {name} takes adapters in the model's dtype, {dtype}; they are {table.weights.dtype}"
        )
    from multilora.lora.triton_backend import MAX_TILE_ROWS, TritonLora

    if chunk_rows > MAX_TILE_ROWS:
        logger.warning("--max-lora-chunk-size %d: %d is used, larger chunks are slower", chunk_rows, MAX_TILE_ROWS)
    return TritonLora(table, sites, name=name, chunk_rows=chunk_rows)


BACKENDS: "dict[str, Callable[[LoraTable, Sites, torch.dtype, int], LoraBackend]]" = {
    "torch": _torch,
    "cpp": _cpp,
    "triton": partial(_triton, "triton"),
    "csgmv": partial(_triton, "csgmv"),
}


def make_lora_backend(
    name: str, table: "LoraTable", *, sites: Sites, dtype: "torch.dtype", chunk_rows: int = 32
) -> "LoraBackend":
    """The backend `name` of the table, over the adapters of `table`, on the device where those are.

    "auto" takes the best that can run there and logs its choice. dtype: of the model's activations; chunk_rows:
    --max-lora-chunk-size. Raises ConfigError for an unknown name and for what cannot run here.
    """
    if name == "auto":
        device = table.weights.device.type
        name = auto_backend(device, table.weights.dtype, dtype)
        logger.info("LoRA backend: %s (chosen for %s, adapters in %s)", name, device, table.weights.dtype)
    if name not in BACKENDS:
        raise ConfigError(f"--lora-backend {name} is not available; there are: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](table, sites, dtype, chunk_rows)


def auto_backend(device: str, adapter_dtype: "torch.dtype", dtype: "torch.dtype") -> str:
    """What "auto" means on a kind of device, for adapters packed in one dtype and activations in another."""
    if device == "cpu":
        return "torch" if _cpp_obstacle(device, adapter_dtype, dtype) else "cpp"
    return "csgmv" if device == "cuda" and adapter_dtype == dtype else "torch"


def _cpp_obstacle(device: str, adapter_dtype: "torch.dtype", dtype: "torch.dtype") -> str | None:
    """The first thing that keeps the C++ backend from a model; None: nothing does."""
    if device != "cpu":
        return f"it runs on a CPU, this is {device}"
    from multilora.kernels.cpp.library import DTYPES, obstacle

    for found in (adapter_dtype, dtype):
        if found not in DTYPES:
            return f"it takes float32, bfloat16 and float16, not {found}"
    return obstacle()
