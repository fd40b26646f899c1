"""`inspect`: facts from PEFT's own files, the loader's verdict, and what is said when there is little to say."""

import json
import os
from pathlib import Path

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from safetensors.torch import load_file, save_file

from multilora import LLM
from multilora.adapter_tools.inspect import inspect
from multilora.errors import ConfigError

PATTERNS = {
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"down_proj": 16},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    make_tiny_model(path / "model")
    make_tiny_model(path / "other", hidden_size=32)
    make_adapter(path / "adapter", path / "model", dtype="bfloat16", **PATTERNS)
    return path


def test_from_the_files_alone(files):
    report = inspect(str(files / "adapter"))
    assert report.method == "rsLoRA"
    assert report.base_model_name_or_path == str(files / "model")
    assert report.bytes_on_disk == sum(
        os.stat(files / "adapter" / name).st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert (report.tensors, report.dtypes) == (12, ["bfloat16"])
    assert [(row.modules, row.layers, row.rank, row.scaling) for row in report.modules] == [
        (["down_proj"], "0-1", 16, 2.0),
        (["q_proj", "v_proj"], "0-1", 4, 4.0),
    ]
    weights = load_file(files / "adapter" / "adapter_model.safetensors")
    assert report.parameters == sum(w.numel() for w in weights.values())
    assert (report.compatible, report.error, report.served, report.ok) == (None, None, None, True)


def test_pages_and_bytes_are_those_of_a_server(files):
    paths = {"a": str(files / "adapter")}
    with LLM(str(files / "model"), lora_paths=paths, skip_tokenizer_init=True, device="cpu", page_size=8) as llm:
        [loaded] = llm.stats().adapters
        llm.generate([5, 6], {"max_new_tokens": 1}, "a")
        [resident] = llm.stats().adapters
    report = inspect(str(files / "adapter"), str(files / "model"), page_size=8)
    assert report.compatible is True and report.served is not None
    assert report.served.nbytes == loaded.host_bytes == resident.device_bytes
    assert report.served.pages * report.served.page_bytes == report.served.nbytes
    half = inspect(str(files / "adapter"), str(files / "model"), page_size=8, dtype="bfloat16")
    assert half.served is not None and half.served.dtype == "bfloat16"
    assert half.served.page_bytes * 2 == report.served.page_bytes


def test_another_model(files):
    report = inspect(str(files / "adapter"), str(files / "other"))
    assert report.compatible is False and not report.ok and report.error is not None
    assert report.error["kind"] == "AdapterIncompatible"
    assert "q_proj" in report.error["message"]
    assert report.method == "rsLoRA" and len(report.modules) == 2


def change(files: Path, to: Path, **fields: object) -> Path:
    to.mkdir(exist_ok=True)
    config = json.loads((files / "adapter" / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | fields))
    weights = (files / "adapter" / "adapter_model.safetensors").read_bytes()
    (to / "adapter_model.safetensors").write_bytes(weights)
    return to


def test_a_refused_feature_still_has_a_table(files, tmp_path):
    report = inspect(str(change(files, tmp_path, peft_type="LOHA")))
    assert report.method == "LOHA" and report.compatible is False
    assert report.error is not None and report.error["kind"] == "AdapterUnsupported"
    assert len(report.modules) == 2


def test_values_that_are_not_finite(files, tmp_path):
    folder = change(files, tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, folder / "adapter_model.safetensors")
    assert inspect(str(folder)).ok
    report = inspect(str(folder), str(files / "model"))
    assert report.error is not None and report.error["kind"] == "AdapterInvalid"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/nowhere/at/all", "AdapterNotFound"), ("no hub id", "AdapterNotFound"), (".", "AdapterNotFound")],
)
def test_nothing_there(path, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = inspect(path)
    assert report.error is not None and report.error["kind"] == kind
    assert report.method is None


def test_broken_weights(files, tmp_path):
    folder = change(files, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"hello")
    report = inspect(str(folder))
    assert report.method == "rsLoRA" and report.modules == []
    assert report.error is not None and "adapter_model.safetensors" in report.error["message"]


def test_a_bad_model_is_an_error_of_the_call(files, tmp_path):
    with pytest.raises(ConfigError):
        inspect(str(files / "adapter"), str(tmp_path / "nowhere"))
