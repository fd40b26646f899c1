"""Writes a GGUF file as a directory of safetensors, config and tokenizer. Run by `gguf.py`, in a process of its own.

    python -m multilora.models.gguf_convert FILE DIRECTORY DTYPE

An error that the user should see is the only thing on standard output: {"kind", "message"} of `multilora.errors`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from multilora.errors import ConfigError, ModelUnsupported, MultiloraError
from multilora.models.load import read_config

SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""Our names of special tokens, and the format's."""


def convert(file: Path, directory: Path, dtype: torch.dtype) -> None:
    """Raises ModelUnsupported before any weight is read, ConfigError for a file that cannot be read."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        config = AutoConfig.from_pretrained(**where)
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        if architecture is None:
            raise ModelUnsupported(f"{file}: {config.model_type} is not an architecture for causal language models")
        config.architectures, config.dtype = [architecture], dtype
        special = special_tokens(file)
        set_token_ids(config, special)
        config.save_pretrained(directory)
        read_config(str(directory))
        tokenizer = AutoTokenizer.from_pretrained(**where)
        for name, token in special.items():
            if 0 <= token < len(tokenizer):
                setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
        tokenizer.save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
        set_token_ids(model.config, special)
        set_token_ids(model.generation_config, special)
        model.save_pretrained(directory)
    except ImportError as e:
        raise ConfigError(f"{file}: {e} (pip install 'multilora[gguf]')") from e
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as e:
        raise ConfigError(f"{file} cannot be read as GGUF: {e!r:.500}") from e


def special_tokens(file: Path) -> dict[str, int]:
    """The ids that the file itself gives. Some versions of transformers name others: 5.17 ends SmolLM2's texts with
    the token that begins a message, and then no answer ends."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: reader.get_field(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    return {name: int(field.contents()) for name, field in fields.items() if field is not None}


def set_token_ids(config: Any, special: dict[str, int]) -> None:
    """Put the ids into a configuration. One that transformers gives several ends keeps them."""
    for name, token in special.items():
        if not isinstance(getattr(config, f"{name}_token_id", None), list):
            setattr(config, f"{name}_token_id", token)


def main(file: str, directory: str, dtype: str) -> int:
    try:
        convert(Path(file), Path(directory), getattr(torch, dtype))
    except MultiloraError as e:
        sys.stdout.write(json.dumps({"kind": e.kind, "message": e.message}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
