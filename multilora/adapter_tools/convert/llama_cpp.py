"""GGUF adapters, as llama.cpp's convert_lora_to_gguf writes them: llama.cpp's names, and rotated heads of Llama.

    blk.0.attn_q.weight.lora_a    A [rank, in]
    blk.0.attn_q.weight.lora_b    B [out, rank]
    adapter.lora.alpha            the scaling is alpha / rank

For the architecture "llama" the rows of each head of q and k are in another order there (even and odd ones apart, as
its rotary embedding wants them), which is undone here with the base model's number of heads. Needs the extra `gguf`.
Called by `convert.py`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from multilora.adapter_tools.convert.found import FoundAdapter
from multilora.adapters.peft.base_model import BaseModel
from multilora.errors import AdapterInvalid, AdapterUnsupported, ConfigError
from multilora.lora.sites import EMBED
from multilora.models.config import ModelConfig

ROTATED = {"llama": ("q_proj", "k_proj")}
SUPPORTED = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "mistral3", "smollm3", "olmo2", "granite")


def read_gguf(file: Path, base: BaseModel, config: ModelConfig) -> FoundAdapter:
    """Raises AdapterUnsupported and AdapterInvalid, naming the tensor; ConfigError without the package gguf."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{file}: reading GGUF needs the package gguf: pip install 'multilora[gguf]'")
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as e:
        raise AdapterInvalid(f"{file.name} cannot be read as GGUF: {e}") from None
    if _field(reader, "general.type") != "adapter" or _field(reader, "adapter.type") != "lora":
        raise AdapterInvalid(f"{file.name} is no LoRA adapter, but a {_field(reader, 'general.type') or 'model'}")
    if _field(reader, "adapter.alora.invocation_tokens") is not None:
        raise AdapterUnsupported(f"{file.name}: activated LoRA (adapter.alora.invocation_tokens) is not converted")
    architecture = str(_field(reader, "general.architecture"))
    if architecture not in SUPPORTED:
        raise AdapterUnsupported(f"{file.name}: architecture {architecture}; there are {', '.join(SUPPORTED)}")
    alpha = float(_field(reader, "adapter.lora.alpha") or 0.0)
    paths = _paths(gguf, base, config.num_layers)
    found = FoundAdapter("llama.cpp")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for tensor in reader.tensors:
        name, _, half = tensor.name.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            raise AdapterUnsupported(f"{tensor.name}: only LoRA matrices are converted")
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        halves.setdefault(name.removesuffix(".weight"), {})[half] = torch.from_numpy(data.copy())
    for name, half_of in sorted(halves.items()):
        module = paths.get(name)
        if module is None or half_of.keys() != {"lora_a", "lora_b"}:
            raise AdapterInvalid(f"{name}: the base model has no such module, or one of its matrices is missing")
        if module.rpartition(".")[2] == EMBED:
            raise AdapterUnsupported(f"{name}: LoRA on the token embedding is not converted from GGUF")
        b = half_of["lora_b"]
        if module.rpartition(".")[2] in ROTATED.get(architecture, ()):
            heads = config.num_heads if module.endswith("q_proj") else config.num_kv_heads
            b = in_order(b, heads)
        a = half_of["lora_a"]
        found.add(module, a, b, alpha or float(a.shape[0]))
    return found


def in_order(b: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head as Hugging Face has them: the two halves of a head were interleaved."""
    out, rank = b.shape
    if out % (2 * heads):
        raise AdapterInvalid(f"{out} rows of lora_b cannot be divided among {heads} heads: another base model?")
    return b.view(heads, out // heads // 2, 2, rank).transpose(1, 2).reshape(out, rank)


def _paths(gguf: Any, base: BaseModel, layers: int) -> dict[str, str]:
    """llama.cpp's name → the module's path in the base model, by the table that llama.cpp converts with."""
    found: dict[str, str] = {}
    for architecture in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.PHI3):
        table = gguf.get_tensor_name_map(architecture, layers)
        for path in base.places:
            if (name := table.get_name(path)) is not None:
                found.setdefault(name, path)
    return found


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
