"""Adapters on experts in the layouts that others write, from PEFT's own: two wrappers of what transformers stacks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
EXPERTS = 6
QWEN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "parent": ".mlp."}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2", "parent": ".block_sparse_moe."}


def by_expert(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """PEFT's own layout with two wrappers as a module per expert, under these names of gate, up and down."""
    found = {}
    for name, tensor in tensors.items():
        at, wrapped, end = name.partition(".experts.")
        if not wrapped:
            found[name] = tensor
            continue
        inner, part = end.startswith("base_layer."), end.split(".")[-2]
        stack = stacked(tensor, part)
        for expert, own in enumerate(stack):
            halves = own.chunk(2) if inner and part == "lora_B" else (own, own)
            for module, half in zip(("gate", "up") if inner else ("down",), halves, strict=False):
                path = f"{at}.experts.{expert}.{names[module]}".replace(".mlp.", names["parent"])
                found[f"{path}.{part}.weight"] = half.clone()
    return found


def stacked(tensor: torch.Tensor, part: str) -> torch.Tensor:
    """PEFT's lora_A [experts · rank, in] or lora_B [out, rank · experts] as [experts, …]."""
    if part == "lora_A":
        return tensor.view(EXPERTS, -1, tensor.shape[1])
    return tensor.view(tensor.shape[0], -1, EXPERTS).permute(2, 0, 1)


def as_stacks(tensors: Tensors, shared: bool = False) -> Tensors:
    """PEFT's own layout with two wrappers as two tensors for each parameter; shared: what all experts have in common
    once."""
    found = {}
    for name, tensor in tensors.items():
        at, wrapped, end = name.partition(".experts.")
        if wrapped:
            inner, part = end.startswith("base_layer."), end.split(".")[-2]
            module, once = ("gate_up_proj", "lora_A") if inner else ("down_proj", "lora_B")
            tensor = stacked(tensor, part)
            name = f"{at}.experts.{module}.{part}.weight"
            if shared and part == once:
                assert torch.equal(tensor, tensor[:1].expand_as(tensor))
                tensor = tensor[:1]
        found[name] = tensor.contiguous()
    return found


def rewrite(path: Path, change: Callable[[Tensors], Tensors], **fields: Any) -> None:
    """Write the adapter's files anew."""
    save_file(change(load_file(path / "adapter_model.safetensors")), path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
