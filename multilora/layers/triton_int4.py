"""The dequantisation of 4-bit tiles on CUDA; `weights/int4_arithmetic.py` is the specification."""

import torch
import triton
import triton.language as tl

from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous


@triton.jit
def _dequantise(packed_ptr, scales_ptr, out_ptr, outs, width, group, WORDS: tl.constexpr, PDL: tl.constexpr):
    """One program per tile of 8 outputs and 32 · WORDS inputs, whose words lie together: [32 lanes, WORDS]."""
    tile_n, tile_k = tl.program_id(1).to(tl.int64), tl.program_id(0)
    lane, word = tl.arange(0, 32)[:, None], tl.arange(0, WORDS)[None, :]
    at = packed_ptr + (tile_n * tl.num_programs(0) + tile_k) * (32 * WORDS) + lane * WORDS + word
    wait_for_previous(PDL)
    bits = tl.load(at)
    row = tile_n * 8 + lane // 4
    for i in tl.static_range(8):
        # the number's place in a word: neighbour · 4 + tile · 2 + half
        column = tile_k * (32 * WORDS) + word * 32 + (i % 4) * 8 + (lane % 4) * 2 + i // 4
        q = ((bits >> (4 * i)) & 15).to(tl.float32) - 8.0
        scale_at = scales_ptr + ((column // group) * outs + row) * 2
        value = q * tl.load(scale_at).to(tl.float32) + tl.load(scale_at + 1).to(tl.float32)
        tl.store(out_ptr + row * width + column, value.to(out_ptr.dtype.element_ty))


def dequantise_into(out: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> None:
    """See `weights/int4_arithmetic.py`."""
    tiles_n, tiles_k, _, words = packed.shape
    outs, width = out.shape
    early = can_launch_early(out.device)
    args = (packed, scales, out, outs, width, group)
    launch(_dequantise, (tiles_k, tiles_n), args, {"WORDS": words, "PDL": early}, early=early, num_warps=1)
