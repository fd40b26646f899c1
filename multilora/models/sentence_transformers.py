"""How a checkpoint's embeddings are made, as the sentence-transformers library writes it beside the weights.

`modules.json` lists what a text goes through, one after the other: the transformer, a pooling layer, which
`1_Pooling/config.json` describes, perhaps a normalisation. What of it would be computed wrongly is refused by name,
before any weight is read. Called by `engine/build_rank.py`.
"""

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from multilora.errors import ConfigError, ModelUnsupported
from multilora.params import EmbeddingSettings, PoolingMethod

logger = logging.getLogger(__name__)

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
METHODS: dict[str, PoolingMethod] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
"""Switches of `1_Pooling/config.json`, and what they mean here."""
BY_NAME: dict[str, PoolingMethod] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
"""Values of its `pooling_mode`, which has taken their place."""


def embedding_settings(
    model_path: str, revision: str | None, size: int, method: PoolingMethod | None = None
) -> EmbeddingSettings:
    """The settings of a local directory or hub id whose hidden rows have `size` numbers. method: what was asked
    for, over that.

    A checkpoint that says nothing takes the last token's row, normalised. Raises ModelUnsupported naming the module
    or setting that is not served, ConfigError for a file that is broken.
    """
    modules = _read_json(model_path, revision, MODULES)
    if modules is None:
        return EmbeddingSettings(size=size, method=method or "last")
    found, normalize = _read_modules(model_path, revision, modules)
    _warn_of_prompts(model_path, revision)
    return EmbeddingSettings(size=size, method=method or found, normalize=normalize)


def _read_modules(model_path: str, revision: str | None, modules: Any) -> tuple[PoolingMethod, bool]:
    """How rows are pooled, and whether the result is normalised."""
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise ConfigError(f"--model-path {model_path}: {MODULES} is no list of modules")
    kinds = [str(m.get("type")).rpartition(".")[2] for m in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ModelUnsupported(
            f"--model-path {model_path}: {MODULES}: embeddings by {', '.join(kinds)} are not supported; Transformer, "
            "Pooling and Normalize are"
        )
    where = f"{modules[1].get('path') or '1_Pooling'}/config.json"
    pooling = _read_json(model_path, revision, where)
    if not isinstance(pooling, dict):
        raise ConfigError(f"--model-path {model_path}: {where} is missing or no object")
    return _method(f"--model-path {model_path}: {where}", pooling), kinds[2:] == ["Normalize"]


def _method(where: str, pooling: dict[str, Any]) -> PoolingMethod:
    named = pooling.get("pooling_mode")
    modes = [str(mode) for mode in named] if isinstance(named, list) else [str(named)]
    if named is None:
        modes = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v is True]
    if not modes:
        modes = ["mean"]  # its default
    found = [METHODS.get(mode) or BY_NAME.get(mode) for mode in modes]
    if len(found) > 1 or found[0] is None:
        raise ModelUnsupported(f"{where}: {' with '.join(modes)} is not supported; one of {', '.join(METHODS)} is")
    if pooling.get("include_prompt") is False:
        raise ModelUnsupported(f"{where}: include_prompt = false is not supported: all tokens are pooled")
    return found[0]


def _warn_of_prompts(model_path: str, revision: str | None) -> None:
    """Nothing is put before a client's text here, and a client may not know."""
    settings = _read_json(model_path, revision, PROMPTS)
    name = settings.get("default_prompt_name") if isinstance(settings, dict) else None
    if name:
        logger.warning("%s: default_prompt_name %r: clients must put that prompt before their texts", PROMPTS, name)


def _read_json(model_path: str, revision: str | None, name: str) -> Any:
    """The contents of a file of the checkpoint; None: there is none."""
    if Path(model_path).is_dir():
        file = Path(model_path, name)
        if not file.is_file():
            return None
    else:
        try:
            file = Path(hf_hub_download(model_path, name, revision=revision))
        except EntryNotFoundError:
            return None
        except OSError as e:
            raise ConfigError(f"--model-path {model_path}: {name} cannot be fetched: {e}") from e
    try:
        return json.loads(file.read_text())
    except ValueError as e:
        raise ConfigError(f"--model-path {model_path}: {name} is no JSON: {e}") from None
