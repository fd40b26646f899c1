"""`multilora adapters convert`: finds out who wrote an adapter, has it read, and writes it as PEFT would.

What cannot be an adapter of PEFT's is refused by name, and nothing is written then. Called by
`cli/adapter_work_commands.py`.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from multilora.adapter_tools.convert.found import FoundAdapter
from multilora.adapter_tools.convert.kohya import is_kohya, read_kohya
from multilora.adapter_tools.convert.llama_cpp import read_gguf
from multilora.adapter_tools.convert.mlx import is_mlx, read_mlx
from multilora.adapter_tools.convert.wrapped import read_pickle, read_wrapped
from multilora.adapter_tools.pairs import check_new, write_adapter
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.config import parse_config
from multilora.adapters.sources.files import CONFIG_NAME, read_json_object
from multilora.errors import AdapterInvalid, AdapterNotFound, ConfigError
from multilora.models.config import ModelConfig
from multilora.models.load import make_model

PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Conversion:
    """What was written. writer: who had written it; notes: what a person should know."""

    path: str
    writer: str
    modules: int
    tensors: int
    notes: list[str] = field(default_factory=list)


def convert(
    path: str,
    out: Path,
    *,
    model_path: str | None = None,
    alpha: float | None = None,
    progress: bool = False,
) -> Conversion:
    """Convert a file or a directory. model_path: the base model, which GGUF files need, and kohya's flat names may;
    alpha: lora_alpha, where no file says it. Raises AdapterError for what cannot be converted, ConfigError."""
    check_new(out)
    source = Path(path).expanduser()
    if not source.exists():
        raise AdapterNotFound(f"{path}: there is no such file or directory")
    found = _read(source, model_path, alpha, progress)
    config, tensors = found.written(model_path)
    parse_config(config, Path(CONFIG_NAME))  # raises what a server would say
    write_adapter(out, config, tensors)
    modules = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    return Conversion(str(out), found.writer, len(modules), len(tensors), found.notes)


def _read(source: Path, model_path: str | None, alpha: float | None, progress: bool) -> FoundAdapter:
    files = [source] if source.is_file() else sorted(file for file in source.iterdir() if file.is_file())
    folder = source if source.is_dir() else source.parent
    if ggufs := [file for file in files if file.suffix == ".gguf"]:
        if model_path is None:
            raise ConfigError(f"{ggufs[0].name}: GGUF needs the base model, for names and heads: --model-path")
        return read_gguf(ggufs[0], *_base(model_path))
    tensors = _tensors(files, progress)
    if is_kohya(tensors):
        paths = None if model_path is None else _base(model_path)[0].places
        return read_kohya(tensors, paths)
    config = folder / CONFIG_NAME
    if config.is_file():
        raw = read_json_object(config)
        return read_mlx(raw, tensors) if is_mlx(raw) else read_wrapped(raw, tensors)
    return _without_config(tensors, alpha)


def _tensors(files: list[Path], progress: bool) -> dict[str, torch.Tensor]:
    """All tensors: of safetensors files, else of pickles."""
    chosen = [file for file in files if file.suffix == ".safetensors"]
    if finals := [file for file in chosen if file.name in ("adapters.safetensors", "adapter_model.safetensors")]:
        chosen = finals  # beside them MLX keeps checkpoints
    pickles = [file for file in files if file.suffix in PICKLES and file.stem in ("adapter_model", "pytorch_model")]
    pickles = pickles or [file for file in files if file.suffix in PICKLES and len(files) == 1]
    found: dict[str, torch.Tensor] = {}
    for file in tqdm(chosen or pickles, desc="read", unit="file", disable=not progress):
        try:
            found |= load_file(file) if file in chosen else read_pickle(file)
        except SafetensorError as e:
            raise AdapterInvalid(f"{file.name}: {e}") from None
        except OSError as e:
            raise AdapterNotFound(f"{file.name}: {e.strerror}") from None
    if not found:
        raise AdapterNotFound(
            f"there are no weights: {', '.join(os.path.basename(f) for f in files[:8]) or 'nothing'}"
        )
    return found


def _without_config(tensors: dict[str, torch.Tensor], alpha: float | None) -> FoundAdapter:
    """PEFT's names without its config: ranks are those of the matrices, and alpha must be told."""
    if alpha is None:
        raise ConfigError(f"there is no {CONFIG_NAME}, so that nothing says lora_alpha: give --alpha")
    wrapped = read_wrapped({}, tensors)
    found = FoundAdapter("PEFT, without its config")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in wrapped.tensors.items():
        module, mark, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if not mark or rest[:1] not in "AB" or not rest.endswith(".weight"):
            raise AdapterInvalid(f"{name}: what it means, only {CONFIG_NAME} would say")
        halves.setdefault(module, {})[rest[0]] = tensor
    for module, half in sorted(halves.items()):
        if half.keys() != {"A", "B"}:
            raise AdapterInvalid(f"{module}: lora_A or lora_B is missing")
        found.add(module, half["A"], half["B"], alpha)
    found.notes = wrapped.notes
    return found


def _base(model_path: str) -> tuple[BaseModel, ModelConfig]:
    model = make_model(model_path, device=torch.device("meta"))
    return BaseModel.of(model, None), model.config
