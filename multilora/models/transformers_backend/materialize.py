"""Gives the parts of a tree that stay transformers' own their memory: parameters to be filled, buffers computed.

Buffers that no checkpoint holds (rotary frequencies, scales) are computed by transformers' own rules, on the CPU, as
it does when it loads a model.
"""

from typing import Any

import torch
from torch import nn


def materialize(lm: Any, device: torch.device) -> None:
    """lm: a tree of transformers, partly on the meta device, in place. A parameter in two places stays one."""
    _fill_buffers(lm)
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in lm.modules():
        for name, param in list(module._parameters.items()):
            if param is not None and param.is_meta:
                if param not in moved:
                    empty = torch.empty_like(param, device=device)  # in the order in memory that it has
                    moved[param] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = moved[param]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _fill_buffers(lm: Any) -> None:
    """Give every buffer memory on the CPU, and let transformers fill those that it derives from the config."""
    for param in lm.parameters():
        param._is_hf_initialized = True
    for module in lm.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    lm.initialize_weights()
