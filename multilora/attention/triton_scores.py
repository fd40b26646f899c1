"""What the attention kernels share: the scores' units and cap, and how many tokens fit in an iteration."""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
"""Scores are multiplied with it, so that exp2 serves, which is what GPUs have."""


@triton.jit
def capped(score, softcap, CAP: tl.constexpr):
    """softcap · tanh(score / softcap) if CAP, else the score."""
    if CAP:
        score = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2E / softcap))))
    return score


ROOMY = 160 << 10
"""Shared memory of a program, from which on keys of `WIDE_BYTES` are taken at a time: A100, H100 and what came after
them have it; other GPUs have 99 KiB."""
WIDE_BYTES, NARROW_BYTES = 32768, 16384


def block_tokens(dtype: torch.dtype, width: int, memory: int) -> int:
    """Tokens of one iteration, for heads of `width` numbers and so much shared memory: keys and values of as many are
    there for each iteration in flight."""
    most = WIDE_BYTES if memory >= ROOMY else NARROW_BYTES
    return max(16, min(64, most // (width * dtype.itemsize)))
