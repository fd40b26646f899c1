"""What a front process reads of the model: its tokenizer, and what its generation_config says of sampling."""

import json
from pathlib import Path
from typing import Any

from multilora.config import Config
from multilora.demo import base_model_path
from multilora.errors import ConfigError
from multilora.front.tokenizer import Tokenizer

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_text(config: Config) -> tuple[Tokenizer | None, dict[str, Any]]:
    """The tokenizer, and the sampling defaults of the model's generation_config. Raises ConfigError."""
    defaults = sampling_defaults(config.model_path or str(base_model_path()), config.revision)
    return Tokenizer.of(config), defaults


def sampling_defaults(model: str, revision: str | None) -> dict[str, Any]:
    """What `generation_config.json` says of sampling, in our words; empty if the model has none."""
    name = "generation_config.json"
    if Path(model).is_dir():
        path = Path(model) / name
        if not path.exists():
            return {}
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(model, name, revision=revision))
        except EntryNotFoundError:
            return {}
        except (OSError, ValueError) as e:
            raise ConfigError(f"--model-path {model!r} is neither a directory nor a hub repository: {e}") from e
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    defaults = {key: found[key] for key in _DEFAULTS if found.get(key) is not None}
    if defaults.get("top_k") == 0:  # transformers' word for "all"
        defaults["top_k"] = -1
    return defaults
