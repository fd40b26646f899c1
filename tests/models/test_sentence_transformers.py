"""How embeddings are made, by the files that sentence-transformers writes."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from multilora.errors import ConfigError, ModelUnsupported
from multilora.models.sentence_transformers import embedding_settings
from multilora.params import EmbeddingSettings

KIND = "sentence_transformers.models."


def write(path: Path, pooling: Any, *kinds: str) -> str:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{k}" if i else "", "type": KIND + k} for i, k in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return str(path)


def test_without_files(tmp_path: Path) -> None:
    assert embedding_settings(str(tmp_path), None, 8) == EmbeddingSettings(size=8, method="last", normalize=True)
    assert embedding_settings(str(tmp_path), None, 8, "mean").method == "mean"


@pytest.mark.parametrize(
    ("pooling", "method"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"word_embedding_dimension": 8}, "mean"),
    ],
)
def test_methods(pooling: dict[str, Any], method: str, tmp_path: Path) -> None:
    path = write(tmp_path, pooling, "Transformer", "Pooling")
    assert embedding_settings(path, None, 8) == EmbeddingSettings(size=8, method=method, normalize=False)
    write(tmp_path, pooling, "Transformer", "Pooling", "Normalize")
    assert embedding_settings(path, None, 8) == EmbeddingSettings(size=8, method=method, normalize=True)
    assert embedding_settings(path, None, 8, "cls").method == "cls"


@pytest.mark.parametrize(
    ("pooling", "kinds", "names"),
    [
        ({"pooling_mode_max_tokens": True}, ("Transformer", "Pooling"), "pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ("Transformer", "Pooling"), "with"),
        ({"pooling_mode_cls_token": True, "include_prompt": False}, ("Transformer", "Pooling"), "include_prompt"),
        ({"pooling_mode": "weightedmean"}, ("Transformer", "Pooling"), "weightedmean"),
        ({"pooling_mode": ["cls", "mean"]}, ("Transformer", "Pooling"), "cls with mean"),
        ({"pooling_mode": 3}, ("Transformer", "Pooling"), "3"),
        ({}, ("Transformer", "Pooling", "Dense"), "Dense"),
        ({}, ("CLIPModel",), "CLIPModel"),
    ],
)
def test_what_is_refused(pooling: Any, kinds: tuple[str, ...], names: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=names):
        embedding_settings(write(tmp_path, pooling, *kinds), None, 8)


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json"])
def test_broken_files(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, {}, "Transformer", "Pooling")
    (tmp_path / name).write_text("{")
    with pytest.raises(ConfigError, match=name):
        embedding_settings(path, None, 8)
    (tmp_path / name).write_text('"text"')
    with pytest.raises(ConfigError, match=name):
        embedding_settings(path, None, 8)


def test_a_prompt_that_clients_must_add(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, {}, "Transformer", "Pooling")
    (tmp_path / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    with caplog.at_level(logging.WARNING):
        embedding_settings(path, None, 8)
    assert "query" in caplog.text
