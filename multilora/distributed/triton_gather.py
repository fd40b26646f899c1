"""An all-gather as one Triton kernel: the columns of all ranks side by side on each, through each other's memory.

    memory of a rank:   | flags, int32 [ranks, SLOTS] | two halves of [ranks, capacity] numbers of 32 bits |

Program p takes the same blocks on all ranks. It writes its rank's numbers to its own result and into the memory of
the others, then raises its flag there to the number of calls so far. When the flag of program p of another rank has
come that far, those numbers have, and are copied to the result. Calls take the halves in turns: a rank that writes
into a half again has seen the other's flag of the call between, which was raised after that had read the half.
Called by `exchange.py`.
"""

import torch
import triton
import triton.language as tl

from multilora.distributed.triton_exchange import CHECK_SPINS, SLOTS
from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous

FLAG_BYTES = SLOTS * 4
BLOCK = 4096


@triton.jit
def wait_for_flag(flag_ptr, count, stop_ptr):
    """Until the flag has come as far as `count`, by which what was written before it can be read, too."""
    ahead = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") - count
    spins = 0
    while ahead < 0:
        ahead = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") - count
        spins += 1
        if spins == CHECK_SPINS:
            spins = 0
            ahead = tl.where(tl.load(stop_ptr, volatile=True) != 0, 0, ahead)


@triton.jit
def _gather_columns(x_ptr, out_ptr, buffers_ptr, counts_ptr, stop_ptr, rows, part, columns, capacity,
                    BLOCK: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    """SLOTS programs. x: [rows, part], out: [rows, columns]."""
    program, i = tl.program_id(0), tl.arange(0, BLOCK)
    blocks = tl.cdiv(part, BLOCK)
    wait_for_previous(PDL)
    count = tl.load(counts_ptr + program) + 1
    half = (count & 1).to(tl.int64) * SIZE
    for item in range(program, rows * blocks, SLOTS):
        row, column = (item // blocks).to(tl.int64), (item % blocks) * BLOCK + i
        mask = column < part
        x = tl.load(x_ptr + row * part + column, mask=mask, other=0.0)
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                flags = tl.multiple_of(tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.float32)), 16)
                to = flags + SIZE * SLOTS + (half + RANK) * capacity
                tl.store(to + row * part + column, x, mask=mask)
        tl.store(out_ptr + row * columns + RANK * part + column, x, mask=mask & (column < columns - RANK * part))
    tl.debug_barrier()  # all threads have written before the flags are raised
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            flags = tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + RANK * SLOTS + program, count, sem="release", scope="sys")
    own = tl.load(buffers_ptr + RANK)
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            wait_for_flag(own.to(tl.pointer_type(tl.int32)) + rank * SLOTS + program, count, stop_ptr)
            tl.debug_barrier()  # no thread reads before the flag was seen
            memory = tl.multiple_of(own.to(tl.pointer_type(tl.float32)), 16)
            come = memory + SIZE * SLOTS + (half + rank) * capacity
            for item in range(program, rows * blocks, SLOTS):
                row, column = (item // blocks).to(tl.int64), (item % blocks) * BLOCK + i
                mask = (column < part) & (column < columns - rank * part)
                x = tl.load(come + row * part + column, mask=mask, other=0.0, cache_modifier=".cg")
                tl.store(out_ptr + row * columns + rank * part + column, x, mask=mask)
    tl.store(counts_ptr + program, count)


def gather_columns(
    x: torch.Tensor,
    columns: int,
    buffers: torch.Tensor,
    counts: torch.Tensor,
    stop: torch.Tensor,
    rank: int,
    capacity: int,
) -> torch.Tensor:
    """x: fp32 [rows, part], contiguous. Returns [rows, columns], part number r from column r · part on.

    buffers: int64 [ranks], the addresses at which this rank finds the memory of each; counts: int32 [SLOTS], zeros at
    first; stop: as for `triton_exchange.all_reduce`; capacity: the most numbers of x.
    """
    rows, part = x.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    early = can_launch_early(x.device)
    args = (x, out, buffers, counts, stop, rows, part, columns, capacity)
    constants = {"BLOCK": BLOCK, "RANK": rank, "SIZE": len(buffers), "SLOTS": len(counts), "PDL": early}
    launch(_gather_columns, (len(counts),), args, constants, early=early, num_warps=8)
    return out
