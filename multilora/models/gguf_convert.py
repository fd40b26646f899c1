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


def convert(file: Path, directory: Path, dtype: torch.dtype) -> None:
    """Raises ModelUnsupported before any weight is read, ConfigError for a file that cannot be read."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        config = AutoConfig.from_pretrained(**where)
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        if architecture is None:
            raise ModelUnsupported(f"{file}: {config.model_type} is not an architecture for causal language models")
        config.architectures, config.dtype = [architecture], dtype
        config.save_pretrained(directory)
        read_config(str(directory))
        AutoTokenizer.from_pretrained(**where).save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(directory)
    except ImportError as e:
        raise ConfigError(f"{file}: {e} (pip install 'multilora[gguf]')") from e
    except (OSError, ValueError, KeyError, IndexError) as e:
        raise ConfigError(f"{file} cannot be read as GGUF: {e!r:.500}") from e


def main(file: str, directory: str, dtype: str) -> int:
    try:
        convert(Path(file), Path(directory), getattr(torch, dtype))
    except MultiloraError as e:
        sys.stdout.write(json.dumps({"kind": e.kind, "message": e.message}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
