"""MXFP4: `quant_method: mxfp4`, in which gpt-oss is published. Its experts are dequantised while they are read.

A matrix [out, in] of an expert is stored as `…_blocks`, uint8 [out, in / 32, 16], two 4-bit floats (e2m1) a byte, the
lower half first, and `…_scales`, uint8 [out, in / 32], the exponent of two that 32 of them share, plus 127 (the OCP
Microscaling specification, version 1.0). bfloat16 holds every such number exactly; in float16 those below its range
become 0, as those of a checkpoint in bfloat16 do. Called by `models/transformers_backend/weights.py`; `methods.py`
finds it by name.
"""

from typing import Any

import torch

from multilora.errors import ModelUnsupported
from multilora.layers.weights.methods import check_fields, not_made
from multilora.layers.weights.plain import PLAIN, WeightFormats

BLOCK = 32
"""Numbers that share a scale."""
BIAS = 127
"""What a stored exponent is too large by."""
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of the codes 0 to 7; from 8 on they are negative."""
CHUNK_BYTES = 8 << 20
"""How many bytes are looked up at a time: a lookup takes several times their memory."""


def dequantised(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """blocks: uint8 [..., groups, 16]; scales: uint8 [..., groups]. Returns [..., 32 · groups] as `dtype`.

    Raises ValueError if a number is beyond what that holds.
    """
    values = torch.tensor([*CODES, *(-v for v in CODES)], device=blocks.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)  # [256, 2], by byte
    flat, exponents = blocks.reshape(-1, BLOCK // 2), scales.reshape(-1, 1)
    out = torch.empty(len(flat), BLOCK, dtype=dtype, device=blocks.device)
    each = CHUNK_BYTES // (BLOCK // 2)
    for start in range(0, len(flat), each):
        part = slice(start, start + each)
        found = pairs[flat[part].int()].view(-1, BLOCK)
        out[part] = torch.ldexp(found, exponents[part].int() - BIAS)
        if not out[part].isfinite().all():
            raise ValueError(f"it has numbers that are not finite in {str(dtype).removeprefix('torch.')}")
    return out.view(*scales.shape[:-1], -1)


class _Mxfp4:
    def read(self, config: dict[str, Any]) -> WeightFormats:
        """See `Method`. What stays in 16 bit need not be known: it is stored under its own name."""
        check_fields(config, ("modules_to_not_convert", "dequantize"))
        return WeightFormats("mxfp4, dequantised", lambda _path: PLAIN)

    def quantise(self) -> WeightFormats:
        raise not_made("mxfp4")


METHOD = _Mxfp4()


def check_blocks(name: str, blocks: Any, scales: Any, shape: tuple[int, ...]) -> None:
    """Raise ModelUnsupported unless these tensors, or slices that safetensors opens, hold a parameter of gpt-oss'
    experts, [experts, in, out], in blocks."""
    experts, width, outs = shape
    expected = [experts, outs, width // BLOCK]
    for suffix, found, wanted in (("blocks", blocks, [*expected, BLOCK // 2]), ("scales", scales, expected)):
        dtype, size = found.get_dtype(), list(found.get_shape())
        if dtype != "U8" or size != wanted or width % BLOCK:
            raise ModelUnsupported(f"tensor {name}_{suffix} is {dtype} {size}, mxfp4 of {list(shape)} is U8 {wanted}")
