"""An adapter's directory as plain pairs of matrices by module, and how such pairs become a directory that PEFT loads.

For tools that need no base model: it reads names, ranks and scalings as the loader does (`adapters/peft/`), and holds
the weights in memory. Called by `compose.py`, `diff.py` and `convert/`.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from multilora.adapters.peft.config import PeftConfig, parse_config
from multilora.adapters.peft.safetensors_file import SafetensorsFile
from multilora.adapters.peft.tensor_names import PREFIX, Part, parse
from multilora.adapters.sources import resolve
from multilora.adapters.sources.files import CONFIG_NAME, WEIGHTS_NAME, find_files, read_json_object, show
from multilora.errors import AdapterInvalid, ConfigError

SIDES = {Part.LORA_A: "a", Part.LORA_B: "b", Part.EMBEDDING_A: "a", Part.EMBEDDING_B: "b"}


@dataclass(frozen=True)
class LoraPair:
    """One module's matrices as PEFT has them. a: [rank, in]; b: [out, rank]; of an embedding, in is the
    vocabulary."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> torch.Tensor:
        """What is added to the weight, fp32 [out, in]."""
        return self.scaling * (self.b.float() @ self.a.float())


@dataclass(frozen=True)
class PairedAdapter:
    """One adapter. pairs: by the module's name inside the base model; others: every other tensor, by its name
    there."""

    path: str
    raw: dict[str, Any]
    config: PeftConfig
    pairs: dict[str, LoraPair]
    others: dict[str, torch.Tensor] = field(default_factory=dict)


def read_pairs(path: str) -> PairedAdapter:
    """The adapter at `path`, a directory or hub id. Raises AdapterNotFound, AdapterInvalid, AdapterUnsupported."""
    files = find_files(resolve(path))
    raw = read_json_object(files.config)
    config = parse_config(raw, files.config)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    embeddings: set[str] = set()
    others: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        for file in files.weights:
            opened = stack.enter_context(SafetensorsFile(file))
            for name in opened.tensors:
                tensor, found = opened.read(name).clone(), parse(name)
                if found is None or found.part not in SIDES:
                    others[name.removeprefix(PREFIX)] = tensor
                    continue
                halves.setdefault(found.module, {})[SIDES[found.part]] = tensor
                if found.part in (Part.EMBEDDING_A, Part.EMBEDDING_B):
                    embeddings.add(found.module)
    pairs = {}
    for module, half in sorted(halves.items()):
        if half.keys() != {"a", "b"} or half["a"].dim() != 2 or half["a"].shape[0] != half["b"].shape[-1]:
            raise AdapterInvalid(f"{show(path)}: {show(module)} has no matching lora_A and lora_B")
        rank = half["a"].shape[0]
        pairs[module] = LoraPair(half["a"], half["b"], config.scaling(module, rank), module in embeddings)
    return PairedAdapter(path, raw, config, pairs, others)


def peft_tensors(pairs: Mapping[str, LoraPair]) -> dict[str, torch.Tensor]:
    """The tensors under PEFT's names."""
    found = {}
    for module, pair in pairs.items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        found[f"{PREFIX}{module}.{a}"], found[f"{PREFIX}{module}.{b}"] = pair.a, pair.b
    return found


def peft_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, base_model: str | None = None, **fields: Any
) -> dict[str, Any]:
    """adapter_config.json of modules with these ranks and alphas: the most frequent ones are `r` and `lora_alpha`,
    the others patterns, by the module's name."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "rank_pattern": {module: r for module, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {module: a for module, a in sorted(alphas.items()) if a != alpha},
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "fan_in_fan_out": False,
    } | fields


def check_new(directory: Path) -> None:
    """Raises ConfigError if something is there already: nothing is overwritten."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"--out {directory}: there is something already")


@contextlib.contextmanager
def new_directory(directory: Path) -> Any:
    """A folder that becomes `directory` when the block ends, and nothing if it raises. Raises ConfigError."""
    check_new(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as e:
        raise ConfigError(f"--out {directory}: {e.strerror}") from None
    try:
        yield work
        work.chmod(0o755)
        if directory.is_dir():
            directory.rmdir()
        os.rename(work, directory)
    except OSError as e:
        raise ConfigError(f"--out {directory}: {e.strerror or e}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter as PEFT would. Raises ConfigError."""
    with new_directory(directory) as work:
        (work / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        save_file({n: t.contiguous() for n, t in sorted(tensors.items())}, work / WEIGHTS_NAME, {"format": "pt"})
