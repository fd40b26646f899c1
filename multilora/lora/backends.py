"""LoRA backends by name. Adding one is a file and a line here."""

import logging
from collections.abc import Callable

import torch

from multilora.errors import ConfigError
from multilora.lora.base import LoraBackend
from multilora.lora.table import LoraTable
from multilora.lora.torch_backend import TorchLora

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Callable[[LoraTable], LoraBackend]] = {
    "torch": TorchLora,
}


def make_lora_backend(name: str, table: LoraTable, device: torch.device) -> LoraBackend:
    """`auto` takes the best that this device can run and logs its choice. Raises ConfigError by name."""
    if name == "auto":
        name = "torch"
        logger.info("LoRA backend: %s (chosen for %s)", name, device.type)
    if name not in BACKENDS:
        raise ConfigError(f"--lora-backend {name} is not available; there are: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](table)
