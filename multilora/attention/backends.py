"""Attention backends by name. Adding one is a function and a line in the table.

The table is also where `--attention-backend` finds its choices, so this file imports no heavy library.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from multilora.attention.kv_dtypes import largest
from multilora.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from multilora.attention.base import AttentionBackend, AttentionShape, KVViews

logger = logging.getLogger(__name__)


MakeBackend = Callable[["KVViews", "AttentionShape", "torch.dtype | None", bool], "AttentionBackend"]


def _flashinfer(
    kv_views: "KVViews", shape: "AttentionShape", dtype: "torch.dtype | None", wait: bool
) -> "AttentionBackend":
    from multilora.attention.flashinfer import FlashInferAttention

    return FlashInferAttention(kv_views, shape, dtype, wait=wait)


def _triton(
    kv_views: "KVViews",
    shape: "AttentionShape",
    dtype: "torch.dtype | None",
    wait: bool,  # noqa: ARG001 - Triton compiles for seconds
) -> "AttentionBackend":
    from multilora.attention.triton_attention import TritonAttention

    return TritonAttention(kv_views, shape, dtype)


def _cpp(
    kv_views: "KVViews",
    shape: "AttentionShape",
    dtype: "torch.dtype | None",  # noqa: ARG001 - it takes the cache's
    wait: bool,  # noqa: ARG001 - whoever chose it has compiled it
) -> "AttentionBackend":
    from multilora.attention.cpp_attention import CppAttention

    return CppAttention(kv_views, shape)


def _torch(
    kv_views: "KVViews",
    shape: "AttentionShape",
    dtype: "torch.dtype | None",  # noqa: ARG001 - it takes any
    wait: bool,  # noqa: ARG001 - it compiles nothing
) -> "AttentionBackend":
    from multilora.attention.torch_sdpa import TorchAttention

    return TorchAttention(kv_views, shape)


BACKENDS: dict[str, MakeBackend] = {
    "flashinfer": _flashinfer,
    "triton": _triton,
    "cpp": _cpp,
    "torch": _torch,
}
"""By name, in the order in which `auto` tries them."""


def make_attention(
    name: str,
    kv_views: "KVViews",
    shape: "AttentionShape",
    dtype: "torch.dtype | None" = None,
    *,
    wait: bool = True,
) -> "AttentionBackend":
    """The backend `name` of the table over `KVLayout.views(arena)`. dtype: of the queries; None: the cache's.
    wait: for kernels that take minutes to compile; else others serve until they are there."""
    return BACKENDS[name](kv_views, shape, dtype, wait)


def choose_attention(
    name: str, device: "torch.device", dtype: "torch.dtype", kv_dtype: "torch.dtype", shape: "AttentionShape"
) -> str:
    """Which backend --attention-backend `name` ("auto" or one of the table) means for a model; logged.

    Raises ConfigError when a backend asked for by name cannot run here; the message says what is missing.
    """
    if name not in ("auto", *BACKENDS):
        raise ConfigError(f"--attention-backend must be one of auto, {', '.join(BACKENDS)}, is {name!r}")
    if name == "auto":
        name, passed = auto_attention(device, dtype, kv_dtype, shape)
        logger.info("attention backend: %s%s", name, f" ({why_not(passed)})" if passed else "")
        return name
    obstacle = OBSTACLES[name](device, dtype, kv_dtype, shape) if name in OBSTACLES else None
    if obstacle:
        raise ConfigError(f"--attention-backend {name}: {obstacle}")
    logger.info("attention backend: %s", name)
    return name


def auto_attention(
    device: "torch.device", dtype: "torch.dtype", kv_dtype: "torch.dtype", shape: "AttentionShape"
) -> tuple[str, dict[str, str]]:
    """The first backend of the table that serves a model, and what keeps each of those before it from that."""
    passed: dict[str, str] = {}
    for name in BACKENDS:
        obstacle = OBSTACLES[name](device, dtype, kv_dtype, shape) if name in OBSTACLES else None
        if obstacle is None:
            return name, passed
        passed[name] = obstacle
    raise AssertionError("torch takes everything")


def why_not(passed: dict[str, str]) -> str:
    """What `auto_attention` found in the way, as a log line has it."""
    by_obstacle: dict[str, list[str]] = {}
    for name, obstacle in passed.items():
        by_obstacle.setdefault(obstacle, []).append(name)
    return "; ".join(f"not {' or '.join(names)}: {obstacle}" for obstacle, names in by_obstacle.items())


def triton_obstacle(
    device: "torch.device", dtype: "torch.dtype", kv_dtype: "torch.dtype", shape: "AttentionShape"
) -> str | None:
    """The first thing that keeps our own kernels from serving a model; None: nothing does."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the model is on {device.type}"
    if str(dtype) not in ("torch.float16", "torch.bfloat16", "torch.float32"):
        return f"it takes float16, bfloat16 and float32, the model is {dtype}"
    if (obstacle := _kv_obstacle(device, dtype, kv_dtype)) is not None:
        return obstacle
    if shape.head_dim > 256 or shape.head_dim % 8:
        return f"it takes a head_dim of up to 256 that 8 divides, the model has {shape.head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def flashinfer_obstacle(
    device: "torch.device", dtype: "torch.dtype", kv_dtype: "torch.dtype", shape: "AttentionShape"
) -> str | None:
    """The first thing that keeps FlashInfer from serving a model; None: nothing does."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the model is on {device.type}"
    if str(dtype) not in ("torch.float16", "torch.bfloat16"):
        return f"it takes float16 and bfloat16, the model is {dtype}"
    if (obstacle := _kv_obstacle(device, dtype, kv_dtype)) is not None:
        return obstacle
    if shape.head_dim not in (64, 128, 256):
        return f"it takes head_dim 64, 128 and 256, the model has {shape.head_dim}"
    if shape.layer_windows or shape.softcap is not None or shape.sinks:
        kind = "windows that differ" if shape.layer_windows else "sinks" if shape.sinks else "a softcap"
        return f"it takes layers that attend alike, without softcap and sinks; the model's have {kind}"
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    return None


def cpp_obstacle(
    device: "torch.device",
    dtype: "torch.dtype",
    kv_dtype: "torch.dtype",
    shape: "AttentionShape",  # noqa: ARG001 - it takes any
) -> str | None:
    """The first thing that keeps our C++ from serving a model; None: nothing does."""
    if device.type != "cpu":
        return f"it needs a CPU, the model is on {device.type}"
    from multilora.kernels.cpp.library import DTYPES, obstacle

    if dtype not in DTYPES or kv_dtype != dtype:
        return f"it takes float32, bfloat16 and float16 with a KV cache of the same; they are {dtype} and {kv_dtype}"
    return obstacle()


OBSTACLES = {"flashinfer": flashinfer_obstacle, "triton": triton_obstacle, "cpp": cpp_obstacle}
"""What keeps a backend from a model; one that is not here serves every model."""


def _kv_obstacle(device: "torch.device", dtype: "torch.dtype", kv_dtype: "torch.dtype") -> str | None:
    """What keeps kernels on a GPU from a KV cache of this dtype."""
    if kv_dtype == dtype:
        return None
    if largest(kv_dtype) is None:
        return f"it takes a KV cache of the model's dtype, {dtype}, or of fp8; the KV cache is {kv_dtype}"
    return None if _has_fp8(device) else "a KV cache of fp8 needs a GPU of compute capability 8.9 or later"


def _has_fp8(device: "torch.device") -> bool:
    import torch

    return torch.cuda.get_device_capability(device) >= (8, 9)
