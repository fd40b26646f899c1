"""From a path or hub id to a model with room for its weights. What is not served is refused from the config alone.

Called by `engine/build_rank.py`; `adapter_tools/` reads configs only.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from multilora.attention.kv_dtypes import KV_DTYPES
from multilora.distributed.group import SINGLE, Group
from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.weights.methods import weight_formats
from multilora.layers.weights.plain import PLAIN_FORMATS
from multilora.models.base import CausalLM
from multilora.models.config import ModelConfig
from multilora.models.heads import classifier_settings, head_kind
from multilora.models.registry import model_classes

logger = logging.getLogger(__name__)


def make_model(
    model_path: str,
    *,
    dtype: str = "auto",
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    context_length: int | None = None,
    model_impl: str = "auto",
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    group: Group = SINGLE,
) -> CausalLM:
    """This rank's part of the model of a local directory or hub id, its weights allocated but not filled (see
    `CausalLM.load`).

    dtype: the name of a torch dtype; "auto": the checkpoint's, float32 on the CPU. quantization, kv_cache_dtype: as
    the options. Fetches JSON files only. Raises ModelUnsupported for an architecture or a setting that is not served,
    ConfigError for a path or file that is missing or broken, or a group that the model cannot be divided among.
    """
    cls, config = read_config(
        model_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        context_length=context_length,
        model_impl=model_impl,
        quantization=quantization,
    )
    if dtype != "auto":
        config = config.with_dtype(getattr(torch, dtype))
    elif device.type == "cpu":
        config = config.with_dtype(torch.float32)
    if kv_cache_dtype != "auto":
        config = replace(config, kv_dtype=getattr(torch, KV_DTYPES[kv_cache_dtype]))
    return cls(config, device, group).eval()


def read_config(
    model_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    context_length: int | None = None,
    model_impl: str = "auto",
    quantization: str | None = None,
) -> tuple[type[CausalLM], ModelConfig]:
    """The model's class and config, `dtype` being the checkpoint's. Fetches JSON files only."""
    if model_path.startswith(("/", ".", "~")) and not os.path.isdir(model_path):
        raise ConfigError(f"--model-path {model_path}: no such directory")
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        raw, _ = PretrainedConfig.get_config_dict(model_path, **where)
        if not raw:
            raise ConfigError(f"--model-path {model_path}: there is no config.json")
        kind = head_kind(raw)
        raw = kind.as_decoder(raw)
        classes = model_classes(raw, model_impl)
        _check_known(raw)
        weights = weight_formats(raw, quantization)
        hf = AutoConfig.from_pretrained(model_path, **where)
        classifier = classifier_settings(kind, hf)
        hf.architectures = raw.get("architectures")
    except OSError as e:
        raise ConfigError(f"--model-path {model_path}: {e}") from e
    except (ValueError, KeyError, TypeError, StrictDataclassError) as e:
        raise ModelUnsupported(f"--model-path {model_path}: config.json: {e}") from e
    cls, config = _configure(
        classes,
        hf,
        generation=_generation_config(model_path, revision),
        context_length=context_length,
        dtype=getattr(hf, "dtype", None) or torch.float32,
    )
    if weights is not PLAIN_FORMATS:
        logger.info("weights of linear layers: %s", weights.name)
    pad = getattr(hf.get_text_config(), "pad_token_id", None)
    config = replace(config, weights=weights, pad_token_id=pad)
    if kind.generates:
        return cls, config
    return cls, replace(config, generates=False, classifier=classifier, tie_word_embeddings=False)


def _check_known(raw: dict[str, Any]) -> None:
    """Raise ModelUnsupported for a kind of model that transformers has never heard of."""
    kind = raw.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING and "auto_map" not in raw:
        names = ", ".join(raw.get("architectures") or []) or "unknown"
        version = transformers.__version__
        what = f"transformers {version} has no model_type {kind!r}"
        raise ModelUnsupported(f"architecture {names} is not supported: {what}")


def _configure(classes: Iterator[type[CausalLM]], hf: Any, **others: Any) -> tuple[type[CausalLM], ModelConfig]:
    """The first class that serves the model, and its config. Raises what the last one says against it."""
    refused: ModelUnsupported | None = None
    for cls in classes:
        if refused:
            logger.info("not served natively (%s): trying %s", refused, cls.__name__)
        try:
            return cls, cls.configure(hf, **others)
        except ModelUnsupported as e:
            refused = e
    assert refused, "no class was given"
    raise refused


def _generation_config(model_path: str, revision: str | None) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(model_path, revision=revision)
    except OSError:
        logger.debug("%s has no generation_config.json", model_path)
        return None
