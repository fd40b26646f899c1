"""GGUF files as base models: each is converted once into a directory as the hub has it, and that is served.

transformers reads the file, in a process of its own (`gguf_convert.py`), whose memory is given back: the weights,
which are dequantised, the config and the tokenizer. Directories are kept in the user's cache, under the file's path,
size and time of change, the dtype and the converter's version. Called by `server/serve.py`, `llm/offline.py`,
`llm/online.py` and `cli/adapter_commands.py`; `cli/doctor/host.py` asks where the cache is.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from multilora.config import Config
from multilora.errors import ConfigError, from_wire
from multilora.module_command import module_command

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
CONVERTER = 2
"""Counted up when what is made of a file changes, so that it is made again."""


def with_directory(config: Config) -> Config:
    """The same config, with the directory of a converted file as its model; the file's name stays the model's.

    Raises ConfigError for a file that is missing or broken and where the package `gguf` is, ModelUnsupported for an
    architecture that is not served.
    """
    path = config.model_path
    if path is None or not path.endswith(SUFFIX):
        return config
    directory = converted(path, _dtype(config))
    return dataclasses.replace(config, model_path=str(directory), served_model_name=config.served_model_name or path)


def converted(path: str, dtype: str) -> Path:
    """The directory of this file with weights of this dtype, made if it is not there yet."""
    file = Path(path).expanduser()
    try:
        status = file.stat()
    except OSError as e:
        raise ConfigError(f"--model-path {path}: {e.strerror}") from None
    key = f"{CONVERTER}|{file.resolve()}|{status.st_size}|{status.st_mtime_ns}|{dtype}"
    directory = cache_folder() / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not directory.is_dir():
        _convert(file, directory, dtype)
    return directory


def _convert(file: Path, directory: Path, dtype: str) -> None:
    """All of it or nothing: another process may be doing the same."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent)
    try:
        logger.info("%s: converting to %s, into %s", file, dtype, directory)
        command = module_command("multilora.models.gguf_convert", str(file), work, dtype)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise _failure(file, done)
        try:
            os.rename(work, directory)
        except OSError:
            if not directory.is_dir():
                raise
    except OSError as e:
        raise ConfigError(f"--model-path {file}: cannot be converted into {directory}: {e}") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _failure(file: Path, done: "subprocess.CompletedProcess[str]") -> Exception:
    try:
        said = json.loads(done.stdout)
    except ValueError:
        return ConfigError(f"--model-path {file}: the conversion ended with code {done.returncode}")
    return from_wire(said["kind"], said["message"])


def _dtype(config: Config) -> str:
    """The name of a torch dtype: what the engine will compute in; as everywhere fp32 on a CPU, bf16 on a GPU."""
    if config.dtype != "auto":
        return config.dtype
    if config.device == "auto":
        import torch

        return "bfloat16" if torch.cuda.is_available() else "float32"
    return "float32" if config.device == "cpu" else "bfloat16"


def cache_folder() -> Path:
    """Where converted files are kept, below XDG_CACHE_HOME."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "multilora", "gguf")
