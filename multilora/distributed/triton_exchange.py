"""Triton kernels in which ranks add up small tensors without a collective's launch: every rank writes its numbers
into the memory of the others and reads theirs from its own.

    word sent:   | flag, 32 bits | two 16-bit numbers, or one of 32 bits |      one aligned store of 64 bits

A reader knows by the flag that the numbers beside it have come, so that nothing else is to be waited for (the "LL"
protocol of NCCL). A row goes through slot `row % SLOTS` on all ranks, always in the program of that number. The flag
is the slot's count of rows so far; rows take the two halves of a slot in turns. A rank that sends the row after next
has read the next one, which its sender sent after having read this one: the half is free again.

The torch code that the tests hold them against adds the ranks' tensors up in the order of ranks, in fp32, and rounds
once; so every rank gets the same bits. `wait` gives up if the host says that the others are gone.
"""

import torch
import triton
import triton.language as tl

from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous

SLOTS = 128
"""Programs of a launch at most. They wait for each other across devices, so all must be running at a time; each takes
one multiprocessor, and devices that can reach each other's memory have more than so many."""

CHECK_SPINS = tl.constexpr(4096)


@triton.jit
def unpack(words, PAIR: tl.constexpr, KIND: tl.constexpr):
    """The numbers of 32-bit words in fp32: the lower and the upper halves, or (PAIR false) the words and zeros."""
    if PAIR:
        low = words.to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
    else:
        low = words.to(tl.float32, bitcast=True)
        high = tl.zeros_like(low)
    return low, high


@triton.jit
def pack(low, high, PAIR: tl.constexpr, KIND: tl.constexpr):
    """The inverse of `unpack`, rounding."""
    if PAIR:
        lower = low.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        upper = high.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return lower | upper
    return low.to(tl.int32, bitcast=True)


@triton.jit
def wait(ptr, mask, flag, stop_ptr):
    """The words at these addresses, int64, once all have this flag."""
    words = tl.load(ptr, mask=mask, other=0, volatile=True)
    missing = tl.max((mask & ((words >> 32).to(tl.int32) != flag)).to(tl.int32), axis=0)
    spins = 0
    while missing != 0:
        words = tl.load(ptr, mask=mask, other=0, volatile=True)
        missing = tl.max((mask & ((words >> 32).to(tl.int32) != flag)).to(tl.int32), axis=0)
        spins += 1
        if spins == CHECK_SPINS:
            spins = 0
            missing = tl.where(tl.load(stop_ptr, volatile=True) != 0, 0, missing)
    return words


@triton.jit
def sum_over_ranks(words, i, mask, slot, flag, buffers_ptr, stop_ptr, WIDTH: tl.constexpr, PAIR: tl.constexpr,
                   KIND: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """The sums of all ranks' numbers at i of a row, as `unpack` gives them, rounded to KIND. words: this rank's."""
    sent = (words.to(tl.int64) & 0xFFFFFFFF) | (flag.to(tl.int64) << 32)
    half = (flag & 1).to(tl.int64) * SIZE
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            to = tl.multiple_of(tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int64)), 16)
            tl.store(to + ((half + RANK) * SLOTS + slot) * WIDTH + i, sent, mask=mask)
    tl.debug_barrier()  # the stores are on their way before anybody waits
    own = tl.multiple_of(tl.load(buffers_ptr + RANK).to(tl.pointer_type(tl.int64)), 16)
    low = tl.zeros(words.shape, tl.float32)
    high = tl.zeros(words.shape, tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            a, b = unpack(words, PAIR, KIND)
        else:
            at = own + ((half + rank) * SLOTS + slot) * WIDTH + i
            a, b = unpack(wait(at, mask, flag, stop_ptr).to(tl.int32), PAIR, KIND)
        low += a
        high += b
    return low.to(KIND).to(tl.float32), high.to(KIND).to(tl.float32)


@triton.jit
def _all_reduce(x_ptr, out_ptr, buffers_ptr, counts_ptr, stop_ptr, rows, words, WIDTH: tl.constexpr,
                BLOCK: tl.constexpr, PAIR: tl.constexpr, KIND: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
                SLOTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per slot. x, out: int32 [rows, words]."""
    slot = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < words
    wait_for_previous(PDL)
    flag = tl.load(counts_ptr + slot)
    for row in range(slot, rows, SLOTS):
        flag += 1
        at = row * words + i
        own = tl.load(x_ptr + at, mask=mask, other=0)
        low, high = sum_over_ranks(own, i, mask, slot, flag, buffers_ptr, stop_ptr, WIDTH, PAIR, KIND, RANK, SIZE,
                                   SLOTS)  # fmt: skip
        tl.store(out_ptr + at, pack(low, high, PAIR, KIND), mask=mask)
    tl.store(counts_ptr + slot, flag)


KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def all_reduce(
    x: torch.Tensor, buffers: torch.Tensor, counts: torch.Tensor, stop: torch.Tensor, rank: int, width: int
) -> torch.Tensor:
    """The sum over ranks, a new tensor. x: [rows, size], contiguous, of an even size if of 16 bits.

    buffers: int64 [ranks], the addresses at which this rank finds the memory of each, which has 2 · ranks · SLOTS ·
    width words of 64 bits; counts: int32 [SLOTS], zeros at first; stop: int32 [1] in memory that the device reads.
    """
    out = torch.empty_like(x)
    words = row_words(x)
    early = can_launch_early(x.device)
    args = (x.view(torch.int32), out.view(torch.int32), buffers, counts, stop, x.shape[0], words)
    constants = exchange_constants(x, rank, len(buffers), width) | {"PDL": early}
    launch(_all_reduce, (min(SLOTS, x.shape[0]),), args, constants, early=early, num_warps=warps(words))
    return out


def row_words(x: torch.Tensor) -> int:
    """How many 32-bit words a row has."""
    return x.shape[-1] * x.element_size() // 4


def warps(words: int) -> int:
    """The warps of a program that holds a row."""
    return int(min(16, max(1, triton.next_power_of_2(words) // 128)))


def exchange_constants(x: torch.Tensor, rank: int, size: int, width: int) -> dict[str, object]:
    """The constants of a kernel that calls `sum_over_ranks` on rows of x, in the order of its parameters."""
    block = triton.next_power_of_2(row_words(x))
    pair = x.element_size() == 2
    return {
        "WIDTH": width, "BLOCK": block, "PAIR": pair, "KIND": KINDS[x.dtype], "RANK": rank, "SIZE": size,
        "SLOTS": SLOTS,
    }  # fmt: skip
