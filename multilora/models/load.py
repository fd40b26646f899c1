"""From a path or hub id to a model that can compute. The order matters: config, refusal, then weights.

Called by `engine/` at start.
"""

import logging
import os
from dataclasses import replace
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from multilora.errors import ConfigError, ModelUnsupported
from multilora.models.config import ModelConfig, model_config
from multilora.models.llama import LlamaForCausalLM
from multilora.models.registry import model_class
from multilora.models.weights import fill_dummy, load_weights

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    model_path: str,
    *,
    dtype: str = "auto",
    device: torch.device,
    load_format: Literal["auto", "dummy"] = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    context_length: int | None = None,
    seed: int = 0,
) -> tuple[LlamaForCausalLM, ModelConfig]:
    """Build and fill the model of a local directory or hub id. dtype `auto`: the checkpoint's, float32 on the CPU.

    Raises ModelUnsupported (before any weight is fetched where the config says so), ConfigError for a path or file
    that is missing or broken.
    """
    cls, config = read_config(
        model_path, revision=revision, trust_remote_code=trust_remote_code, context_length=context_length
    )
    if dtype != "auto":
        config = replace(config, dtype=DTYPES[dtype])
    elif device.type == "cpu":
        config = replace(config, dtype=torch.float32)
    model = cls(config, device)
    if load_format == "dummy":
        fill_dummy(model, seed)
    else:
        load_weights(model, model_path, revision)
    return model.eval(), config


def read_config(
    model_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    context_length: int | None = None,
) -> tuple[type[LlamaForCausalLM], ModelConfig]:
    """The model's class and config, `dtype` being the checkpoint's. Fetches JSON files only."""
    if model_path.startswith(("/", ".", "~")) and not os.path.isdir(model_path):
        raise ConfigError(f"--model-path {model_path}: no such directory")
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        raw, _ = PretrainedConfig.get_config_dict(model_path, **where)
        if not raw:
            raise ConfigError(f"--model-path {model_path}: there is no config.json")
        cls = model_class(raw)
        hf = AutoConfig.from_pretrained(model_path, **where)
    except OSError as e:
        raise ConfigError(f"--model-path {model_path}: {e}") from e
    except (ValueError, KeyError, TypeError, StrictDataclassError) as e:
        raise ModelUnsupported(f"--model-path {model_path}: config.json: {e}") from e
    config = model_config(
        hf,
        generation=_generation_config(model_path, revision),
        family=cls.settings(hf),
        context_length=context_length,
        dtype=getattr(hf, "dtype", None) or torch.float32,
    )
    return cls, config


def _generation_config(model_path: str, revision: str | None) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(model_path, revision=revision)
    except OSError:
        logger.debug("%s has no generation_config.json", model_path)
        return None
