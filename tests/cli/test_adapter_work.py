"""`multilora adapters merge | compose | convert | diff | bench`: flags, text, JSON, exit codes.

Covers `adapter_work_commands.py` too.
"""

import json
from functools import partial

import pytest
from fakes.models import make_adapter, make_tiny_model

from multilora.__main__ import main
from multilora.adapters.loading.loader import InlineLoader
from multilora.cli import parser as cli
from multilora.cli.adapter_work import AdapterWorkArgs
from multilora.engine.build import build_engine
from multilora.errors import ConfigError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    make_tiny_model(path / "model")
    for name, seed in (("a", 1), ("b", 2)):
        make_adapter(path / name, path / "model", r=4, target_modules=["q_proj"], seed=seed)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))
    monkeypatch.setattr("multilora.logs.setup", lambda *_, **__: None)

    def call(*argv):
        code = main(["adapters", *map(str, argv)])
        return code, *capsys.readouterr()

    return call


def test_merge(run, files, tmp_path):
    code, out, _ = run("merge", files / "a", "--model-path", files / "model", "--out", tmp_path / "new")
    assert code == 0 and "2 of 21 tensors changed" in out and (tmp_path / "new" / "model.safetensors").exists()
    code, _, err = run("merge", files / "a", "--model-path", files / "model", "--out", tmp_path / "new")
    assert code == 2 and "--out" in err


def test_compose_and_diff(run, files, tmp_path):
    code, out, _ = run("compose", files / "a", f"{files / 'b'}=0.5", "--out", tmp_path / "new")
    assert code == 0 and "cat, 2 modules of rank 8, exactly the weighted sum" in out
    code, out, _ = run("compose", files / "a", "--method", "svd", "--out", tmp_path / "svd", "--json")
    assert code == 0 and json.loads(out)["rank"] == 4
    code, out, _ = run("diff", files / "a", tmp_path / "new")
    assert code == 1 and "r: 4 → 8" in out and "4 → 8" in out and "0 of 2 are equal" in out
    code, out, _ = run("diff", files / "a", files / "a", "--json")
    assert code == 0 and json.loads(out)["change"] == 0
    assert run("diff", files / "a", files / "a")[1] == "the same\n"


def test_convert(run, files, tmp_path):
    code, out, _ = run("convert", files / "a", "--out", tmp_path / "new")
    assert code == 0 and "from PEFT: 2 modules, 4 tensors" in out
    code, out, _ = run("convert", tmp_path / "nowhere", "--out", tmp_path / "other")
    assert code == 1 and out.startswith("convert: refused: AdapterNotFound")
    code, out, _ = run("convert", tmp_path / "nowhere", "--out", tmp_path / "other", "--json")
    assert code == 1 and json.loads(out)["error"]["kind"] == "AdapterNotFound"


def test_bench(run, files):
    numbers = ("--batch", "1", "--prompt", "4", "--steps", "1", "--device", "cpu")
    code, out, _ = run("bench", files / "a", "--model-path", files / "model", *numbers)
    assert code == 0 and "rank 4" in out and "one decode step" in out
    code, out, _ = run("bench", files / "a", "--model-path", files / "model", *numbers, "--json")
    assert json.loads(out)["decode"][0]["batch"] == 1


def test_parsed():
    args = cli.parse(
        ["adapters", "compose", "a=2", "b", "x=y=-1", "--out", "o", "--method", "ties", "--density", "0.5"]
    )
    expected = dict(out="o", weights=(2.0, 1.0, -1.0), method="ties", density=0.5)
    assert args == AdapterWorkArgs("compose", ("a", "b", "x=y"), **expected)
    assert cli.parse(["adapters", "diff", "a", "b"]) == AdapterWorkArgs("diff", ("a", "b"))
    args = cli.parse(["adapters", "bench", "a", "--model", "m", "--batch", "1", "2"])
    assert args == AdapterWorkArgs("bench", ("a",), "m", batch=(1, 2))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["compose", "a=x", "--out", "o"], "PATH=WEIGHT"),
        (["compose", "=1", "--out", "o"], "PATH=WEIGHT"),
        (["compose", "a=nan", "--out", "o"], "PATH=WEIGHT"),
        (["compose", "a"], "--out"),
        (["compose", "a", "--out", "o", "--method", "mean"], "--method"),
        (["merge", "a", "--out", "o"], "--model-path"),
        (["diff", "a"], "PATH"),
        (["convert", "a", "--out", "o", "--alhpa", "1"], "--alhpa"),
    ],
)
def test_wrong(argv, said):
    with pytest.raises(ConfigError, match=said):
        cli.parse(["adapters", *argv])


@pytest.mark.parametrize("command", ["merge", "compose", "convert", "diff", "bench"])
def test_help(command, capsys):
    with pytest.raises(SystemExit):
        cli.parse(["adapters", command, "--help"])
    assert f"usage: multilora adapters {command}" in capsys.readouterr().out
