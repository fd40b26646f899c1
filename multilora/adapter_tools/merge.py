"""`multilora adapters merge`: the base model with an adapter in its weights, as a checkpoint of its own.

The adapter is read as a server reads it, so that every rule of PEFT's is applied, and each tensor of the base model's
files is changed in fp32 and written in its own dtype, file by file: no model is built. Called by
`cli/adapter_work_commands.py`.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from multilora.adapter_tools.pairs import check_new, new_directory
from multilora.adapters.adapter import AdapterLimits, Block, Full, LowRank, Rows, Vector, VectorKind
from multilora.adapters.peft.base_model import SCORE_PLACE, BaseModel, Place
from multilora.adapters.peft.checkpoint import read_adapter
from multilora.adapters.sources import resolve
from multilora.errors import AdapterUnsupported, ConfigError
from multilora.lora.sites import EMBED, TABLES
from multilora.models.load import make_model
from multilora.models.weights import checkpoint_files

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


@dataclass(frozen=True)
class MergedModel:
    """What was written. changed: tensors that the adapter changed, of all `tensors`."""

    path: str
    tensors: int
    changed: int
    nbytes: int


def merge(path: str, model_path: str, out: Path, *, progress: bool = False) -> MergedModel:
    """Merge the adapter at `path` into the base model. Raises AdapterError, AdapterUnsupported for what a weight
    cannot hold, ConfigError and ModelUnsupported for a bad or a quantised model."""
    check_new(out)
    model = make_model(model_path, dtype="auto", device=torch.device("meta"))
    files = checkpoint_files(model_path)
    folder = files[0].parent
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        raise ConfigError(f"--model-path {model_path} is quantised: merge into the model that it was made from")
    base = BaseModel.of(model, str(folder))
    adapter = read_adapter(resolve(path), base, AdapterLimits())
    if adapter.invocation_tokens is not None:
        raise AdapterUnsupported(f"{path}: activated LoRA acts on a part of the prompt, which no weight can")
    changes = _by_place(path, adapter.blocks, base)
    rows = next((len(b.weight) for b in adapter.blocks if isinstance(b, Full) and b.module in TABLES), None)
    with new_directory(out) as work:
        written = _write(files, work, changes, base, progress)
        if changes:
            place = next(iter(changes))
            raise AdapterUnsupported(
                f"{path}: {base.paths.get(place, place.module)}: the base model's files have no such tensor"
            )
        if rows is not None:
            config["vocab_size"] = rows
        _copy_others(folder, work)
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _copy_tokenizer(resolve(path), work)
    return MergedModel(str(out), *written)


def _by_place(path: str, blocks: Iterable[Block], base: BaseModel) -> dict[Place, list[Block]]:
    """The blocks by the module that they change. Raises AdapterUnsupported for what cannot be merged."""
    found: dict[Place, list[Block]] = {}
    for block in blocks:
        place = Place(-1, block.module) if isinstance(block, Rows) else Place(block.layer, block.module)
        if block.module in TABLES and base.tie_word_embeddings:
            raise AdapterUnsupported(
                f"{path}: {block.module}: the base model uses one table as embed_tokens and lm_head, so a change "
                "of one of them cannot be merged"
            )
        if place == SCORE_PLACE or base.is_of_experts(place):
            raise AdapterUnsupported(f"{path}: {block.module}: merging into experts or heads is not supported")
        found.setdefault(place, []).append(block)
    return found


def _write(
    files: list[Path], work: Path, changes: dict[Place, list[Block]], base: BaseModel, progress: bool
) -> tuple[int, int, int]:
    """Every file of the checkpoint, changed. What is merged is taken out of `changes`. Returns tensors, changed ones,
    bytes."""
    weight_map, changed, nbytes = {}, 0, 0
    total = sum(len(_names(file)) for file in files)
    with tqdm(total=total, desc="merge", unit="tensor", disable=not progress) as bar:
        for file in files:
            tensors = {}
            with safe_open(file, framework="pt", device="cpu") as opened:
                names = sorted(opened.keys(), key=lambda name: not name.endswith(".bias"))  # before their weights
                for name in names:
                    tensor, new = opened.get_tensor(name), None
                    place = base.place_of(name.rpartition(".")[0])
                    if place in changes:
                        new = _changed(name, tensor, changes[place], base)
                        if not changes[place]:
                            del changes[place]
                    changed += new is not None
                    tensors[name] = tensor if new is None else new
                    nbytes += tensors[name].nbytes
                    weight_map[name] = file.name
                    bar.update()
            save_file(tensors, work / file.name, {"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(weight_map), changed, nbytes


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt", device="cpu") as opened:
        return list(opened.keys())


def _changed(name: str, tensor: torch.Tensor, blocks: list[Block], base: BaseModel) -> torch.Tensor | None:
    """The tensor with those blocks of its module that concern it, which are taken out; None: none does."""
    vectors = (VectorKind.BIAS, VectorKind.LORA_BIAS)
    is_bias = name.endswith(".bias")
    own = [b for b in blocks if (isinstance(b, Vector) and b.kind in vectors) == is_bias]
    if not own:
        return None
    for block in own:
        blocks.remove(block)
    if tensor.dtype not in FLOATS:
        raise ConfigError(f"{name} of the base model is {tensor.dtype}: only floats can be merged into")
    new: torch.Tensor = tensor.float()
    transposed = own[0].module in base.transposed
    new = new.T if transposed else new
    for block in sorted(own, key=lambda b: isinstance(b, Vector)):  # DoRA scales the sum
        new = _with(new, block)
    new = new.T if transposed else new
    return new.to(tensor.dtype).contiguous()


def _with(weight: torch.Tensor, block: Block) -> torch.Tensor:
    """fp32 [out, in], or a bias [out]."""
    if isinstance(block, LowRank):
        a, b = block.a.float(), block.b.float()
        return weight + block.scaling * (a.T @ b if block.module == EMBED else b.T @ a)
    if isinstance(block, Full):
        return block.weight.float()
    if isinstance(block, Rows):
        weight = weight.clone()
        weight[list(block.token_ids)] = block.weight.float()
        return weight
    if block.kind is VectorKind.MAGNITUDE:
        norms: torch.Tensor = weight.norm(dim=1)
        return weight * (block.value.float() / norms)[:, None]
    value = block.value.float()
    return value if block.kind is VectorKind.BIAS else weight + block.scaling * value


def _copy_others(folder: Path, work: Path) -> None:
    """Tokenizer, chat template and other settings of the base model."""
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.name != "config.json":
            shutil.copyfile(file, work / file.name)


def _copy_tokenizer(adapter: Path, work: Path) -> None:
    """An adapter's own tokenizer, which a trainer saves beside it, goes before the base model's."""
    names: list[Any] = [
        *adapter.glob("tokenizer*"),
        *adapter.glob("*.jinja"),
        *adapter.glob("special_tokens_map.json"),
    ]
    for file in names:
        if file.is_file():
            shutil.copyfile(file, work / file.name)
