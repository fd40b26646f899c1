"""FP8 as checkpoints have it and what it means: written a second time, sharing no code with the package."""

from typing import Any

import torch
from quantised import Tensors

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FLOATS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": scheme}}
    return config | {"ignore": ["lm_head"], "quantization_status": "compressed"}


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clip(-448, 448).to(torch.float8_e4m3fn)


def largest(x: torch.Tensor) -> torch.Tensor:
    """Of every row, as a scale."""
    return x.abs().max(dim=-1, keepdim=True).values.clip(min=1e-10) / 448


def rounded(x: torch.Tensor) -> torch.Tensor:
    return to_fp8(x, largest(x)).float() * largest(x)


def rounded_in_parts(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([rounded(part) for part in x.split(size, dim=-1)], dim=-1)


# fp8 in blocks


def in_blocks(name: str, weight: torch.Tensor, size: int = 128) -> Tensors:
    scales = torch.stack(
        [
            torch.stack([block.abs().max() / 448 for block in row.split(size, dim=1)])
            for row in weight.split(size, dim=0)
        ]
    )
    return {"weight": to_fp8(weight, _spread(scales, weight, size)), "weight_scale_inv": scales}


def _spread(scales: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
    return torch.kron(scales, torch.ones(size, size))[: weight.shape[0], : weight.shape[1]]


def from_blocks(held: Tensors, size: int = 128) -> Any:
    weight = held["weight"].float() * _spread(held["weight_scale_inv"], held["weight"], size)
    return weight, lambda x: rounded_in_parts(x, size)


# fp8 with one scale


def by_tensor(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    return {"weight": to_fp8(weight, scale), "weight_scale": scale}


def from_tensor(held: Tensors) -> Any:
    return held["weight"].float() * held["weight_scale"], rounded


def given(name: str, weight: torch.Tensor) -> Tensors:
    """With the scale of its inputs."""
    scale = torch.tensor([0.02 if "q_proj" in name else 0.03])
    return by_tensor(name, weight) | {"input_scale": scale}


def from_given(held: Tensors) -> Any:
    scale = held["input_scale"]
    return from_tensor(held)[0], lambda x: to_fp8(x, scale).float() * scale


# fp8 by compressed-tensors


def by_row(name: str, weight: torch.Tensor) -> Tensors:
    scale = largest(weight)
    return {"weight": to_fp8(weight, scale), "weight_scale": scale}


def unrounded(held: Tensors) -> Any:
    return from_tensor(held)[0], torch.nn.Identity()
