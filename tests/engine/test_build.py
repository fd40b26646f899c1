"""What is refused while an engine is put together, before it takes memory. (What is built: every other test.)

Covers `build_rank.py` too.
"""

import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes.models import make_tiny_model

from multilora.adapters.host.staging import Staging
from multilora.config import Config
from multilora.engine import build
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


def test_target_modules_that_the_model_does_not_have_are_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    said = r"--lora-target-modules: LlamaForCausalLM has no module 'w_proj'; it has .*q_proj, k_proj, .*lm_head"
    with pytest.raises(ConfigError, match=said):
        build_engine(Config.make(model_path=str(tmp_path), lora_target_modules=["q_proj", "w_proj"]))
    for known in (["q_proj", "lm_head"], "all", None):
        with pytest.raises(ConfigError, match=r"neither model\.safetensors"):
            build_engine(Config.make(model_path=str(tmp_path), lora_target_modules=known))


GPU = torch.device("cuda")


@pytest.fixture
def small_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pages of it, on a system with enough memory and an obliging driver."""
    driver = SimpleNamespace(cudaHostRegister=lambda *args: 0, cudaHostUnregister=lambda *args: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(build, "spare_memory", lambda: 1 << 40)
    monkeypatch.setattr(build, "Staging", lambda: Staging(1 << 16))


def test_adapters_are_staged_for_a_gpu_only(small_staging: None) -> None:
    assert build._staging(torch.device("cpu")) is None
    staging = build._staging(GPU)
    assert staging is not None and staging.nbytes == 1 << 16
    staging.close()


def refused(*args: object) -> int:
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("where", "instead", "said"),
    [
        (build, {"spare_memory": lambda: 1 << 30}, r"1\.0+ GiB of memory are left, too little"),
        (build, {"Staging": refused}, "no memory to stage them: .* Cannot allocate memory"),
        (
            "multilora.adapters.host.staging",
            {"prefault_write": lambda *args: False},
            "cannot be pinned: too little memory",
        ),
        (torch.cuda, {"cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *args: 2)}, "cannot be pinned: 2"),
    ],
)
def test_without_staging_memory_the_engine_starts_and_says_so(
    where, instead, said, small_staging: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name, function in instead.items():
        if isinstance(where, str):
            monkeypatch.setattr(f"{where}.{name}", function)
        else:
            monkeypatch.setattr(where, name, function)
    assert build._staging(GPU) is None
    assert re.search(f"adapters load slower: .*{said}", caplog.text)
    end = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > before:  # a thread holds the memory until it has ended
        assert time.monotonic() < end
        time.sleep(0.001)
