"""Programmatic dependent launch: a small kernel starts while the one before it still runs, and waits inside.

What it saves is the launch latency, about a microsecond each. Used by the Triton kernels of this package and of
`layers/`. The rule: every program calls `wait_for_previous` before it touches what an earlier kernel may still read
or write, so that a finished kernel means that all before it have finished.
"""

# mypy: disallow-untyped-defs=False

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def early_launch(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that has a PDL parameter: on from Hopper on."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
