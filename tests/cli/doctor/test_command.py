"""`multilora doctor` on this machine: text, JSON, exit codes."""

import json

import pytest
from cpp import ON_CPU

from multilora import __version__
from multilora.__main__ import main
from multilora.cli.doctor import command
from multilora.cli.doctor.devices import Devices
from multilora.cli.doctor.packages import InstalledPackage, InstalledPackages


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("multilora.logs.setup", lambda *_, **__: None)
    monkeypatch.setattr(command, "find_devices", lambda: Devices(None, False, [], []))


def test_text(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"multilora {__version__}")
    assert f"attention {ON_CPU}, LoRA {ON_CPU}, no CUDA graphs" in out
    assert "note: no GPU" in out and out.endswith("a server can run here\n")


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is True and facts["auto"]["attention"] == ON_CPU
    assert {"packages", "devices", "host", "findings"} <= facts.keys()
    assert any("no GPU" in finding["what"] for finding in facts["findings"])


def test_a_problem_is_exit_code_1(monkeypatch, capsys):
    broken = InstalledPackages(True, [InstalledPackage("torch", ">=99", "2.13.0")])
    monkeypatch.setattr(command, "installed_packages", lambda: broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM: torch 2.13.0 is too old" in out and "can run here" not in out


def test_a_bad_model(capsys):
    assert main(["doctor", "--model-path", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
