"""What is refused while an engine is put together, before it takes memory. (What is built: every other test.)"""

import pytest
import torch

from multilora.config import Config
from multilora.engine.build import build_engine, choose_device
from multilora.errors import ConfigError


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda: PyTorch sees no CUDA device"):
        build_engine(Config.make(device="cuda"))


def test_auto_takes_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"


def test_flashinfer_on_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--attention-backend flashinfer: it needs a CUDA device"):
        build_engine(Config.make(device="cpu", attention_backend="flashinfer"))
