"""The kernels of `edits.py` on CUDA: penalties, grammar masks and biases. `triton_sampling.py` launches them.

`numbers` is `SamplingBatch.numbers`, float64 [len(Column), rows].
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from multilora.engine.sampling.batch import Column
from multilora.engine.sampling.triton_kernels import COUNTS, number
from multilora.kernels.triton_launch import wait_for_previous

REPETITION = tl.constexpr(int(Column.REPETITION))
FREQUENCY = tl.constexpr(int(Column.FREQUENCY))
PRESENCE = tl.constexpr(int(Column.PRESENCE))
BIAS = tl.constexpr(int(Column.BIAS))
BIASED = tl.constexpr(int(Column.BIASED))
MASK = tl.constexpr(int(Column.MASK))


@triton.jit(do_not_specialize=["rows", "counts_width", "words"])
def edit(logits_ptr, out_ptr, numbers_ptr, counts_ptr, masks_ptr,
         rows, vocab, stride, counts_width, words, mask_vocab,
         BLOCK: tl.constexpr, MASKS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per (row, block): a copy of the logits with penalties and grammar masks."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + i, mask=i < vocab, other=0.0)
    counts_row = number(numbers_ptr, COUNTS, row, rows).to(tl.int64)
    if counts_row > 0:
        repetition = number(numbers_ptr, REPETITION, row, rows).to(tl.float32)
        frequency = number(numbers_ptr, FREQUENCY, row, rows).to(tl.float32)
        presence = number(numbers_ptr, PRESENCE, row, rows).to(tl.float32)
        counted = tl.load(counts_ptr + counts_row * counts_width + i, mask=i < counts_width, other=0)
        count = counted // 2
        repeated = tl.where(x < 0.0, x * repetition, tl.div_rn(x, repetition))
        x = tl.where(counted > 0, repeated, x)
        x = tl.where(count > 0, x - (count.to(tl.float32) * frequency + presence), x)
    if MASKS:
        line = number(numbers_ptr, MASK, row, rows).to(tl.int64)
        if line >= 0:
            word = tl.load(masks_ptr + line * words + i // 32, mask=i < tl.minimum(mask_vocab, words * 32), other=0)
            x = tl.where(((word >> (i % 32)) & 1) == 1, x, float("-inf"))
    tl.store(out_ptr + row * vocab + i, x, mask=i < vocab)


@triton.jit(do_not_specialize=["rows", "width"])
def bias(logits_ptr, numbers_ptr, ids_ptr, values_ptr, rows, vocab, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per row: add the values to the logits in place. A token may have two of them, the second −inf."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    count = number(numbers_ptr, BIASED, row, rows).to(tl.int32)
    at = number(numbers_ptr, BIAS, row, rows).to(tl.int64) * width
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + at + i, mask=i < count, other=0)
        tl.atomic_add(logits_ptr + row * vocab + token, tl.load(values_ptr + at + i, mask=i < count, other=0.0),
                      mask=i < count)  # fmt: skip
