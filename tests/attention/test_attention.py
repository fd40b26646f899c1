"""Which backend is chosen, and what is said when it cannot be."""

import importlib.util
import logging

import pytest
import torch

from multilora.attention import flashinfer_obstacle, make_attention
from multilora.errors import ConfigError
from multilora.memory.kv_layout import KVLayout

LAYOUT = KVLayout(1, 4, 2, 64, torch.float32)
SHAPE = {
    "kv_views": LAYOUT.views(torch.zeros(3, LAYOUT.page_bytes, dtype=torch.uint8)),
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 64,
    "scale": 1.0,
    "sliding_window": None,
}


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_torch_is_chosen_and_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "multilora.attention"):
        assert make_attention(name, **SHAPE).name == "torch"
    assert "attention backend: torch" in caplog.text


def test_flashinfer_by_name_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="CUDA device"):
        make_attention("flashinfer", **SHAPE)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="auto, flashinfer, torch"):
        make_attention("flash", **SHAPE)


def test_obstacles_are_named_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages:
        device = torch.device("cuda")
        dtype = torch.float32

    found: list[object] = [None]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[0])
    assert "float32" in flashinfer_obstacle(Pages, 64)  # type: ignore[arg-type, operator]
    Pages.dtype = torch.bfloat16
    assert "head_dim" in flashinfer_obstacle(Pages, 80)  # type: ignore[arg-type, operator]
    assert "flashinfer-python" in flashinfer_obstacle(Pages, 64)  # type: ignore[arg-type, operator]
    found[0] = object()
    assert flashinfer_obstacle(Pages, 64) is None  # type: ignore[arg-type]
