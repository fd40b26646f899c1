"""`multilora adapters`: flags, tables, JSON, and exit codes.

Covers `adapter_commands.py` too.
"""

import json
from functools import partial
from pathlib import Path

import pytest
from fakes.models import make_adapter, make_tiny_model

from multilora.__main__ import main
from multilora.adapters.loading.loader import InlineLoader
from multilora.cli import parser as cli
from multilora.cli.adapters import AdapterArgs
from multilora.engine.build import build_engine
from multilora.errors import ConfigError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    make_tiny_model(path / "model")
    make_adapter(
        path / "adapter", path / "model", r=4, lora_alpha=4, target_modules=["q_proj", "o_proj"], use_dora=True
    )
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """(exit code, stdout, stderr) of a command line, in this process."""
    monkeypatch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))
    monkeypatch.setattr("multilora.logs.setup", lambda *_, **__: None)

    def call(*argv: str | Path) -> tuple[int, str, str]:
        code = main(["adapters", *map(str, argv)])
        return code, *capsys.readouterr()

    return call


def test_inspect_without_a_model(run, files):
    code, out, _ = run("inspect", files / "adapter")
    assert code == 0
    assert out.splitlines()[0] == str(files / "adapter")
    lines = [line.split() for line in out.splitlines()]
    assert ["method", "LoRA", "+", "DoRA"] in lines
    assert ["LoRA", "o_proj", "q_proj", "0-1", "4", "1", "2,048"] in lines
    assert ["DoRA", "magnitude", "o_proj", "q_proj", "0-1", "256"] in lines
    assert out.endswith("compatible: give --model-path to find out\n")


def test_inspect_with_a_model(run, files):
    code, out, _ = run("inspect", files / "adapter", "--model-path", files / "model")
    assert code == 0 and out.endswith("compatible: yes\n")
    assert "when served" in out
    code, out, _ = run("inspect", files / "adapter", "--model", files / "model", "--json", "--page-size", "32")
    report = json.loads(out)
    assert code == 0 and report["compatible"] is True
    assert report["served"]["page_bytes"] == 2 * 2 * 32 * 2 * 16 * 4
    assert report["modules"][0] == {
        "kind": "LoRA",
        "modules": ["o_proj", "q_proj"],
        "layers": "0-1",
        "rank": 4,
        "scaling": 1.0,
        "parameters": 2048,
    }


def test_inspect_of_a_bad_adapter(run, files, tmp_path):
    code, out, _ = run("inspect", tmp_path, "--model-path", files / "model")
    assert code == 1 and "not served: AdapterNotFound: adapter_config.json is missing" in out
    code, out, _ = run("inspect", tmp_path, "--json")
    assert code == 1 and json.loads(out)["error"]["kind"] == "AdapterNotFound"


def test_names_from_the_file_cannot_steer_the_terminal(run, files, tmp_path):
    config = json.loads((files / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "\x1b[2J\nx", "peft_type": "\x1b[31m"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = (files / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    _, out, _ = run("inspect", tmp_path)
    assert "\x1b" not in out and r"\x1b[2J\nx" in out


def test_verify(run, files):
    where = (files / "adapter", "--model-path", files / "model", "--device", "cpu")
    code, out, _ = run("verify", *where)
    assert code == 0
    assert "16 of 16" in out and "the same as PEFT" in out.splitlines()[-1]
    code, out, _ = run("verify", *where, "--json", "--tolerance", "1e-12")
    verdict = json.loads(out)
    assert code == 1 and verdict["ok"] is False
    assert verdict["difference"] == max(check["difference"] for check in verdict["checks"] if check["adapter"])
    code, out, _ = run("verify", *where, "--tolerance", "1e-12")
    assert code == 1 and "NOT the same" in out and "the base model alone differs too" in out


def test_verify_of_a_bad_adapter(run, files, tmp_path):
    code, out, _ = run("verify", tmp_path, "--model-path", files / "model")
    assert code == 1 and "not served: AdapterNotFound" in out
    code, out, _ = run("verify", tmp_path, "--model-path", files / "model", "--json")
    assert code == 1 and json.loads(out)["error"]["kind"] == "AdapterNotFound"


def test_wrong_arguments(run, files):
    for argv, said in (
        (["verify", "x"], "--model-path"),
        (["inspect"], "PATH"),
        (["inspect", "x", "--dtpe", "float16"], "'--dtpe'"),
        (["inspect", "x", "--dtype", "int8"], "--dtype"),
        (["inspect", "x", "--model-path", "/nowhere"], "/nowhere"),
        (["inspect", "x", "--model-path", str(files / "model"), "--page-size", "0"], "--page-size"),
        (["verify", "x", "--model-path", "y", "--tolerance", "-1"], "--tolerance"),
        ([], "COMMAND"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, ""), argv
        assert said in err


def test_parsed():
    given = cli.parse(["adapters", "verify", "a", "--model", "m", "--prompts", "one", "two", "--dtype", "bfloat16"])
    assert given == AdapterArgs("verify", "a", "m", "bfloat16", False, prompts=("one", "two"))
    assert cli.parse(["adapters", "inspect", "a"]) == AdapterArgs("inspect", "a", None, None, False)
    with pytest.raises(ConfigError, match="--prompts"):
        cli.parse(["adapters", "verify", "a", "--model", "m", "--prompts"])


@pytest.mark.parametrize("command", [["adapters"], ["adapters", "inspect"], ["adapters", "verify"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: multilora adapters" in capsys.readouterr().out
