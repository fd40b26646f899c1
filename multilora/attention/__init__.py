"""Attention over the paged KV cache. Backends by name; `base.py` is the contract.

Called by `engine/runner.py`, once, when the arena exists.
"""

import importlib.util
import logging

import torch

from multilora.attention.base import AttentionBackend
from multilora.attention.torch_sdpa import KVViews, TorchAttention
from multilora.errors import ConfigError

logger = logging.getLogger(__name__)


def make_attention(
    name: str,
    *,
    kv_views: KVViews,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    sliding_window: int | None,
) -> AttentionBackend:
    """The backend of --attention-backend `name` (auto, flashinfer, torch) over `KVLayout.views(arena)`.

    Raises ConfigError when a backend asked for by name cannot run here; the message says what is missing.
    """
    if name not in ("auto", "flashinfer", "torch"):
        raise ConfigError(f"--attention-backend must be one of auto, flashinfer, torch, is {name!r}")
    shape = (kv_views, num_heads, num_kv_heads, head_dim, scale, sliding_window)
    obstacle = None if name == "torch" else flashinfer_obstacle(kv_views[0][0], head_dim)
    if name == "torch" or (name == "auto" and obstacle):
        logger.info("attention backend: torch%s", f" (not flashinfer: {obstacle})" if obstacle else "")
        return TorchAttention(*shape)
    if obstacle:
        raise ConfigError(f"--attention-backend flashinfer: {obstacle}")
    from multilora.attention.flashinfer import FlashInferAttention

    logger.info("attention backend: flashinfer")
    return FlashInferAttention(*shape)


def flashinfer_obstacle(pages: torch.Tensor, head_dim: int) -> str | None:
    """The first thing that keeps FlashInfer from serving these KV pages; None: nothing does."""
    if pages.device.type != "cuda":
        return f"it needs a CUDA device, the model is on {pages.device.type}"
    if pages.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, the model is {pages.dtype}"
    if head_dim not in (64, 128, 256):
        return f"it takes head_dim 64, 128 and 256, the model has {head_dim}"
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    return None
