"""GGUF files as base models: the weights that they hold, served; what is wrong with a file, said.

Covers `gguf_convert.py` too.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from gguf_files import write_gguf
from peft import PeftModel
from transformers import AutoModelForCausalLM, GgufConfig

from multilora import LLM
from multilora.config import Config
from multilora.errors import ConfigError, ModelUnsupported
from multilora.models import gguf, gguf_convert
from multilora.models.gguf_convert import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT

PROMPT = [5, 9, 31, 12, 7, 44]
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(root))
        yield root / "multilora" / "gguf"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    model = make_tiny_model(path / "model", "qwen2", **SIZES)
    make_adapter(path / "a", path / "model", r=4, target_modules="all-linear")
    write_gguf(path / "tiny.gguf", model, quantised=True)
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Convert in this process, without the seconds that another one takes to start."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "multilora.models.gguf_convert"]
        code = main(*command[3:])
        return subprocess.CompletedProcess(command, code, capsys.readouterr().out)

    monkeypatch.setattr(gguf.subprocess, "run", run)


def greedy(model: torch.nn.Module) -> list[int]:
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.slow
def test_a_quantised_file_is_served_with_adapters(files: Path, cache: Path) -> None:
    """Token for token what transformers and PEFT make of the same file."""
    path = str(files / "tiny.gguf")
    base = AutoModelForCausalLM.from_pretrained(
        files, gguf_file="tiny.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    expected = [greedy(base), greedy(PeftModel.from_pretrained(base, files / "a"))]
    assert expected[0] != expected[1]
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    with LLM(path, device="cpu", lora_paths={"a": str(files / "a")}, max_total_tokens=512) as llm:
        answers = llm.generate([PROMPT] * 2, params, lora_path=[None, "a"])
        assert llm.config.model_name == path
    assert [answer.token_ids for answer in answers] == expected
    (directory,) = cache.iterdir()
    made = directory.stat().st_mtime_ns
    assert gguf.with_directory(Config.make(model_path=path, device="cpu")).model_path == str(directory)
    assert directory.stat().st_mtime_ns == made and list(cache.iterdir()) == [directory], "it is found again"


def test_a_file_that_has_changed_is_converted_again(here: None, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_gguf(tmp_path / "x.gguf", make_tiny_model(tmp_path / "model", "qwen2", seed=seed, **SIZES))
        directory = gguf.converted(str(tmp_path / "x.gguf"), "float32")
        found = AutoModelForCausalLM.from_pretrained(directory)
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        for name, weight in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[name], weight), name


@pytest.mark.usefixtures("here")
def test_special_tokens_are_the_files_whatever_transformers_makes_of_them(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = gguf_convert.AutoTokenizer.from_pretrained

    def misread(*args: Any, **kwargs: Any) -> Any:
        tokenizer = read(*args, **kwargs)
        tokenizer.eos_token = tokenizer.bos_token
        return tokenizer

    read_model = gguf_convert.AutoModelForCausalLM.from_pretrained

    def misread_model(*args: Any, **kwargs: Any) -> Any:
        model = read_model(*args, **kwargs)
        model.config.eos_token_id = model.generation_config.eos_token_id = 1
        return model

    monkeypatch.setattr(gguf_convert.AutoTokenizer, "from_pretrained", misread)
    monkeypatch.setattr(gguf_convert.AutoModelForCausalLM, "from_pretrained", misread_model)
    gguf_convert.convert(files / "tiny.gguf", tmp_path, torch.float32)
    tokenizer = read(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text())["eos_token_id"] == 2


def test_other_models_are_left_alone() -> None:
    for path in (None, "org/name", "/some/directory"):
        config = Config.make(model_path=path)
        assert gguf.with_directory(config) is config


def test_bad_files(here: None, tmp_path: Path, cache: Path) -> None:
    before = set(cache.iterdir())
    with pytest.raises(ConfigError, match=r"no\.gguf: No such file"):
        gguf.converted(str(tmp_path / "no.gguf"), "float32")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"bad\.gguf cannot be read as GGUF"):
        gguf.converted(str(tmp_path / "bad.gguf"), "float32")
    assert set(cache.iterdir()) == before, "nothing is left of a conversion that failed"


def test_what_is_not_served_is_refused_before_weights_are_read(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: str) -> None:
        raise ModelUnsupported("architecture Qwen2ForCausalLM is not supported")

    monkeypatch.setattr("multilora.models.gguf_convert.read_config", refuse)
    monkeypatch.setattr("multilora.models.gguf_convert.AutoModelForCausalLM", None)
    assert main(str(files / "tiny.gguf"), str(tmp_path / "out"), "float32") == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "ModelUnsupported"
