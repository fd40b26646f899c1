"""What PyTorch says of the GPUs, and what `auto` means there: the backends' own rules, not a second list."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from cpp import ON_CPU
from fakes.models import make_tiny_model

from multilora.cli.doctor import devices
from multilora.cli.doctor.devices import Gpu, auto_choices, find_devices
from multilora.errors import ConfigError

H200 = Gpu("NVIDIA H200", (9, 0), 132, 140 << 30, 139 << 30, True)
T4 = Gpu("Tesla T4", (7, 5), 40, 15 << 30, 15 << 30, True)


@pytest.fixture
def two_gpus(monkeypatch):
    facts = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda _index: facts,
        "mem_get_info": lambda _index: (10, 100),
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "can_device_access_peer": lambda _a, _b: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_gpus(two_gpus):
    found = find_devices()
    assert found.driver and found.unlinked == [(0, 1)]
    assert found.gpus == [Gpu("NVIDIA H200", (9, 0), 132, 100, 10, True)] * 2
    assert found.gpus[0].has_bfloat16 and found.gpus[0].has_fp8


def test_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    assert find_devices() == devices.Devices(torch.version.cuda, False, [], [])
    (tmp_path / "version").write_text("NVRM")
    assert find_devices().driver


@pytest.mark.parametrize(
    ("archs", "capability", "compiled"),
    [
        (["sm_80", "sm_86"], (8, 9), True),
        (["sm_90a"], (9, 0), True),
        (["sm_80"], (9, 0), False),
        (["sm_120"], (12, 0), True),
        (["sm_89"], (8, 0), False),
        (["compute_80"], (12, 0), True),
    ],
)
def test_machine_code(monkeypatch, archs, capability, compiled):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    assert devices._compiled(capability) is compiled


def test_auto_on_a_cpu():
    found = auto_choices(None, None)
    assert (found.device, found.dtype, found.attention, found.lora) == ("cpu", "float32", ON_CPU, ON_CPU)
    assert not found.cuda_graphs and "CUDA" in found.obstacle


def test_auto_on_a_gpu(monkeypatch):
    real, there = importlib.util.find_spec, SimpleNamespace()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there if name == "flashinfer" else real(name))
    found = auto_choices(None, H200)
    assert (found.dtype, found.attention, found.lora) == ("bfloat16", "flashinfer", "csgmv")
    assert found.cuda_graphs and found.obstacle is None
    assert auto_choices(None, T4).dtype == "float16"


def test_auto_for_a_model(tmp_path):
    make_tiny_model(tmp_path)
    found = auto_choices(str(tmp_path), H200)
    assert found.model == str(tmp_path) and found.attention == "triton" and found.cuda_graphs
    assert found.obstacle.startswith("not flashinfer: ") and "float32" in found.obstacle
    with pytest.raises(ConfigError, match="no such directory"):
        auto_choices("/nowhere", None)
