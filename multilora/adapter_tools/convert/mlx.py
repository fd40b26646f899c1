"""Adapters as mlx-lm writes them: matrices the other way round, one scale instead of alpha.

    adapters.safetensors     model.layers.0.self_attn.q_proj.lora_a   [in, rank]
                             model.layers.0.self_attn.q_proj.lora_b   [rank, out]
    adapter_config.json      fine_tune_type, num_layers, lora_parameters: rank, scale, …

The scale is the factor itself, so alpha is scale · rank. Called by `convert.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from multilora.adapter_tools.convert.found import FoundAdapter
from multilora.adapters.peft.tensor_names import PREFIX
from multilora.errors import AdapterInvalid, AdapterUnsupported

EMBEDDING = "embed_tokens"
PARTS = ("lora_a", "lora_b", "m")


def is_mlx(raw: Mapping[str, Any]) -> bool:
    """Whether this is mlx-lm's adapter_config.json."""
    return "peft_type" not in raw and ("lora_parameters" in raw or "fine_tune_type" in raw)


def read_mlx(raw: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> FoundAdapter:
    """Raises AdapterUnsupported and AdapterInvalid, naming field or tensor."""
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterUnsupported(f"fine_tune_type {kind!r} is no LoRA")
    scale = _scale(raw)
    found = FoundAdapter("MLX")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if "switch_" in module or tensor.dim() > 2:
            raise AdapterUnsupported(f"{name}: stacked experts are not converted")
        if part not in PARTS:
            raise AdapterUnsupported(f"{name}: only LoRA and DoRA matrices are converted")
        modules.setdefault(module, {})[part] = tensor
    for module, parts in sorted(modules.items()):
        if not {"lora_a", "lora_b"} <= parts.keys():
            raise AdapterInvalid(f"{module}: lora_a or lora_b is missing")
        embedding = module.rpartition(".")[2] == EMBEDDING
        a, b = parts["lora_a"].T, parts["lora_b"].T
        found.add(module, a, b, scale * a.shape[0], embedding=embedding)
        if "m" in parts:
            if embedding:
                raise AdapterUnsupported(f"{module}.m: DoRA on the token embedding is not supported")
            found.tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = parts["m"].reshape(-1).contiguous()
    if any("m" in parts for parts in modules.values()):
        found.config["use_dora"] = True
        if not all("m" in parts for parts in modules.values()):
            raise AdapterUnsupported("some modules have DoRA's magnitudes and others not")
    return found


def _scale(raw: Mapping[str, Any]) -> float:
    parameters = raw.get("lora_parameters") or {}
    scale = parameters.get("scale")
    if scale is None and "alpha" in parameters and parameters.get("rank"):  # older versions
        scale = parameters["alpha"] / parameters["rank"]
    if not isinstance(scale, int | float):
        raise AdapterInvalid("adapter_config.json: lora_parameters.scale is missing")
    return float(scale)
