"""`multilora plan`: text, JSON, picture, exit codes."""

import json

import pytest

from multilora.__main__ import main
from multilora.planner import planner as planning
from scripts.calibrate_planner import llama

ARGV = ["plan", "--model", "8b", "--adapters", "16", "--prompt", "64", "--answer", "16"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("multilora.logs.setup", lambda *_, **__: None)
    monkeypatch.setattr(planning, "REQUESTS", 60)
    monkeypatch.setattr(planning, "SHARES", (0.5, 0.9))
    monkeypatch.setattr(planning, "HALVINGS", 3)
    monkeypatch.setattr(planning, "model_facts", lambda *_, **__: llama())


def test_text(capsys):
    assert main([*ARGV, "--rps", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("8b on one h200\n16 adapters of rank 16, 64 tokens in, 16 out")
    assert "16 of 16 adapters beside 64 running requests" in out
    assert "every step has --max-running-requests requests" in out
    assert next(line for line in out.splitlines() if line.startswith("→ ")).split()[1] == "1"


def test_gpus_that_share_the_model(capsys, monkeypatch):
    monkeypatch.setattr(planning, "model_facts", lambda *_, tp_size, **__: llama("llama-8b", tp_size))
    assert main([*ARGV, "--tp-size", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("8b on 2 × h200\n") and "without adapters on each" in out


def test_json_and_a_rate_that_is_too_high(capsys):
    assert main([*ARGV, "--rps", "100000", "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["workload"]["rps"] == 100000 and plan["breaks_at"] < 100000
    assert plan["advice"][0]["why"].startswith("1e+05 requests a second are more")


def test_a_gpu_that_nobody_has_measured(capsys):
    assert main([*ARGV, "--gpu", "h100", "--host-bytes", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert "data sheet" in out and "12 fit the host memory given" in out


def test_the_picture(tmp_path, capsys):
    assert main([*ARGV, "--plot", str(tmp_path / "plan.svg")]) == 0
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    assert main([*ARGV, "--plot", str(tmp_path / "no" / "plan.svg")]) == 2
    assert "--plot" in capsys.readouterr().err


def test_a_model_that_does_not_fit(capsys, monkeypatch):
    from dataclasses import replace

    from multilora.planner import gpus

    monkeypatch.setitem(gpus.GPUS, "tiny", replace(gpus.GPUS["h200"], name="tiny", memory=1 << 30))
    assert main([*ARGV, "--gpu", "tiny"]) == 2
    assert "arena" in capsys.readouterr().err
