"""Which backend is chosen, and what is said when it cannot be.

Covers `backends.py`, `base.py` too.
"""

import importlib.util
import logging
from typing import Any

import pytest
import torch
from cpp import NEEDS_CPP, ON_CPU

from multilora.attention.backends import BACKENDS, choose_attention, flashinfer_obstacle, make_attention
from multilora.attention.base import AttentionShape
from multilora.errors import ConfigError
from multilora.kernels.cpp import library
from multilora.memory.kv_layout import KVLayout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32


def shape(head_dim: int, **others: Any) -> AttentionShape:
    return AttentionShape(2, 2, head_dim, 1.0, None, **others)


@pytest.mark.parametrize(
    ("name", "chosen"), [("auto", ON_CPU), pytest.param("cpp", "cpp", marks=NEEDS_CPP), ("torch", "torch")]
)
def test_what_a_cpu_takes_is_chosen_and_logged(name: str, chosen: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "multilora.attention"):
        assert choose_attention(name, CPU, FP32, FP32, shape(64)) == chosen
    assert f"attention backend: {chosen}" in caplog.text
    assert ("not flashinfer or triton: it needs a CUDA device" in caplog.text) == (name == "auto")


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "missing"),
    [(torch.float64, torch.float64, "torch.float64"), (BF16, torch.float8_e5m2, "torch.float8_e5m2")],
)
def test_cpp_by_name_says_what_is_missing(dtype: torch.dtype, kv_dtype: torch.dtype, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"--attention-backend cpp: it takes .*{missing}"):
        choose_attention("cpp", CPU, dtype, kv_dtype, shape(64))
    assert choose_attention("auto", CPU, dtype, kv_dtype, shape(64)) == "torch"


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(library, "_load", lambda: "there is no C++ compiler (g++ or clang++)")
    with caplog.at_level(logging.INFO, "multilora.attention"):
        assert choose_attention("auto", CPU, BF16, BF16, shape(64)) == "torch"
    assert "not cpp: there is no C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match=r"--attention-backend cpp: there is no C\+\+ compiler"):
        choose_attention("cpp", CPU, BF16, BF16, shape(64))


@pytest.mark.parametrize(
    ("device", "dtype", "kv_dtype", "head_dim", "missing"),
    [
        (CPU, BF16, BF16, 64, "CUDA device"),
        (CUDA, FP32, FP32, 64, "torch.float32"),
        (CUDA, BF16, torch.float16, 64, "the KV cache is torch.float16"),
        (CUDA, BF16, BF16, 80, "head_dim"),
        (CUDA, BF16, torch.float8_e5m2, 64, "compute capability 8.9"),
    ],
)
def test_flashinfer_by_name_says_what_is_missing(device, dtype, kv_dtype, head_dim, missing, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=f"--attention-backend flashinfer: .*{missing}"):
        choose_attention("flashinfer", device, dtype, kv_dtype, shape(head_dim))


@pytest.mark.parametrize(
    ("packages", "chosen"),
    [
        (("flashinfer", "triton"), "flashinfer"),
        (("flashinfer",), "flashinfer"),
        (("triton",), "triton"),
        ((), "torch"),
    ],
)
def test_auto_takes_the_first_that_is_installed(packages, chosen, monkeypatch, caplog) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)
    with caplog.at_level(logging.INFO, "multilora.attention"):
        assert choose_attention("auto", CUDA, BF16, BF16, shape(128)) == chosen
    passed = list(BACKENDS)[: list(BACKENDS).index(chosen)]
    missing = {
        "flashinfer": "the package flashinfer-python is not installed",
        "triton": "the package triton is not installed",
        "cpp": "it needs a CPU, the model is on cuda",
    }
    said = "; ".join(f"not {name}: {missing[name]}" for name in passed)
    assert caplog.messages == [f"attention backend: {chosen}" + f" ({said})" * bool(said)]
    if "flashinfer" not in packages:
        with pytest.raises(ConfigError, match="flashinfer-python is not installed"):
            choose_attention("flashinfer", CUDA, BF16, BF16, shape(128))


@pytest.mark.parametrize(
    ("dtype", "found", "chosen", "why"),
    [
        (BF16, shape(96), "triton", "the model has 96"),
        (BF16, shape(8), "triton", "the model has 8"),
        (FP32, shape(128), "triton", "the model is torch.float32"),
        (BF16, shape(128, layer_windows=(None, 8)), "triton", "windows that differ"),
        (BF16, shape(128, softcap=30.0), "triton", "a softcap"),
        (BF16, shape(64, sinks=True), "triton", "sinks"),
        (BF16, shape(512), "torch", "not triton: it takes a head_dim of up to 256 that 8 divides, the model has 512"),
        (BF16, shape(36), "torch", "not triton: it takes a head_dim of up to 256 that 8 divides, the model has 36"),
        (torch.float64, shape(128), "torch", "not triton: it takes float16, bfloat16 and float32"),
    ],
)
def test_auto_takes_triton_where_flashinfer_cannot(dtype, found, chosen, why, monkeypatch, caplog) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with caplog.at_level(logging.INFO, "multilora.attention"):
        assert choose_attention("auto", CUDA, dtype, dtype, found) == chosen
    assert f"attention backend: {chosen} (not flashinfer: " in caplog.text and why in caplog.text


@pytest.mark.parametrize(
    ("device", "dtype", "kv_dtype", "head_dim", "missing"),
    [
        (CPU, BF16, BF16, 64, "CUDA device"),
        (CUDA, torch.float64, torch.float64, 64, "torch.float64"),
        (CUDA, BF16, torch.float16, 64, "the KV cache is torch.float16"),
        (CUDA, BF16, torch.float8_e5m2, 64, "compute capability 8.9"),
        (CUDA, BF16, BF16, 512, "head_dim"),
        (CUDA, BF16, BF16, 36, "head_dim"),
    ],
)
def test_triton_by_name_says_what_is_missing(device, dtype, kv_dtype, head_dim, missing, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=f"--attention-backend triton: .*{missing}"):
        choose_attention("triton", device, dtype, kv_dtype, shape(head_dim))


def test_triton_takes_what_flashinfer_does_not() -> None:
    odd = shape(96, layer_windows=(None, 8), softcap=30.0, sinks=True)
    assert flashinfer_obstacle(CUDA, FP32, FP32, odd)
    assert choose_attention("triton", CUDA, FP32, FP32, odd) == "triton"


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="auto, flashinfer, triton, cpp, torch"):
        choose_attention("flash", CPU, FP32, FP32, shape(64))


def test_obstacles_are_named_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for device, dtype, head_dim, said in (
        (CPU, FP32, 80, "CUDA"),
        (CUDA, FP32, 80, "float32"),
        (CUDA, BF16, 80, "head_dim"),
        (CUDA, BF16, 64, "flashinfer-python"),
    ):
        assert said in (flashinfer_obstacle(device, dtype, dtype, shape(head_dim)) or "")


def test_the_backend_over_an_arena() -> None:
    layout = KVLayout(1, 4, 2, 64, torch.float32)
    views = layout.views(torch.zeros(3, layout.page_bytes, dtype=torch.uint8))
    assert make_attention("torch", views, shape(64)).name == "torch"
    assert list(BACKENDS) == ["flashinfer", "triton", "cpp", "torch"]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"layer_windows": (None, 8)}, "windows that differ"),
        ({"softcap": 30.0}, "a softcap"),
        ({"sinks": True}, "sinks"),
    ],
)
def test_flashinfer_names_what_its_kernels_lack(others: dict[str, Any], said: str) -> None:
    assert said in (flashinfer_obstacle(CUDA, BF16, BF16, shape(64, **others)) or "")


def test_the_window_of_a_layer() -> None:
    assert AttentionShape(2, 2, 64, 1.0, 7).window_of(1) == 7
    assert [shape(64, layer_windows=(None, 8)).window_of(layer) for layer in (0, 1)] == [None, 8]
