"""Attention over the paged KV cache. Backends by name; `base.py` is the contract.

Called by `engine/build.py`, once the arena exists.
"""

import importlib.util
import logging

import torch

from multilora.attention.base import AttentionBackend, AttentionShape
from multilora.attention.torch_sdpa import KVViews, TorchAttention
from multilora.errors import ConfigError

logger = logging.getLogger(__name__)


def make_attention(name: str, kv_views: KVViews, shape: AttentionShape) -> AttentionBackend:
    """The backend `name`, flashinfer or torch, over `KVLayout.views(arena)`."""
    if name == "torch":
        return TorchAttention(kv_views, shape)
    from multilora.attention.flashinfer import FlashInferAttention

    return FlashInferAttention(kv_views, shape)


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Which backend --attention-backend `name` (auto, flashinfer, torch) means for a model; logged.

    Raises ConfigError when a backend asked for by name cannot run here; the message says what is missing.
    """
    if name not in ("auto", "flashinfer", "torch"):
        raise ConfigError(f"--attention-backend must be one of auto, flashinfer, torch, is {name!r}")
    obstacle = None if name == "torch" else flashinfer_obstacle(device, dtype, head_dim)
    if name == "flashinfer" and obstacle:
        raise ConfigError(f"--attention-backend flashinfer: {obstacle}")
    chosen = "torch" if name == "torch" or obstacle else "flashinfer"
    logger.info("attention backend: %s%s", chosen, f" (not flashinfer: {obstacle})" if obstacle else "")
    return chosen


def flashinfer_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The first thing that keeps FlashInfer from serving a model; None: nothing does."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the model is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, the model is {dtype}"
    if head_dim not in (64, 128, 256):
        return f"it takes head_dim 64, 128 and 256, the model has {head_dim}"
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    return None
