"""What the attention kernels share: the scores' units and cap, and how many tokens fit in an iteration."""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
"""Scores are multiplied with it, so that exp2 serves, which is what GPUs have."""

BLOCK_BYTES = 32768
"""Keys of one iteration: twice that, keys and values, are in shared memory for each iteration in flight."""


@triton.jit
def capped(score, softcap, CAP: tl.constexpr):
    """softcap · tanh(score / softcap) if CAP, else the score."""
    if CAP:
        score = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2E / softcap))))
    return score


def block_tokens(dtype: torch.dtype, width: int) -> int:
    """Tokens of one iteration, for heads of `width` numbers."""
    return max(16, min(64, BLOCK_BYTES // (width * dtype.itemsize)))
