"""Sums and logits of decode size on CUDA without NCCL: ranks write into each other's memory (`triton_exchange.py`,
`triton_gather.py`).

A step of a few rows has two sums a layer, each of a few hundred KiB at most, which take longer to start than to move,
and its logits, which are to lie side by side. What is larger is NCCL's. Knows no models.
"""

import logging
from typing import Protocol

import torch
from torch._C import _distributed_c10d as c10d

from multilora.distributed.peer_memory import PeerMemory, have_atomics

logger = logging.getLogger(__name__)

WIDTH = 4096
"""32-bit words of the widest row: 8,192 numbers of 16 bits."""

MOST_ROWS = {2: 256, 4: 128, 8: 64}
"""Rows that are summed here at most, by the number of ranks, each of which gets a row from every other."""


GATHER_BYTES = 128 << 20
"""Each rank's memory for logits: that is twice those of 130 rows of 128,256 tokens."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Buffers(Protocol):
    """What `PeerMemory` is, or stands for."""

    addresses: list[int]


class Exchange:
    """What kernels that sum over ranks need, and which tensors are for them.

    buffers: int64 [ranks], addresses of each rank's memory; counts: int32 [SLOTS], the rows of each slot so far;
    stop: int32 [1], not zero when nobody is to wait any longer. What gathering needs lies behind what sums do, in
    the same memory.
    """

    def __init__(self, memory: Buffers, rank: int, size: int, device: torch.device, *, gathers: bool = True):
        from multilora.distributed.triton_exchange import SLOTS

        self.rank, self.size, self.width = rank, size, WIDTH
        self._memory = memory
        self._most_rows = MOST_ROWS.get(size, 0)
        self.buffers = torch.tensor(memory.addresses, dtype=torch.int64, device=device)
        self.counts = torch.zeros(SLOTS, dtype=torch.int32, device=device)
        self.stop = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.gather_buffers = self.buffers + sums_bytes(size)
        self.gather_counts = torch.zeros(SLOTS, dtype=torch.int32, device=device)
        self._gathered = GATHER_BYTES // (2 * size * 4) if gathers else 0  # numbers of one rank at a time

    def fits(self, x: torch.Tensor) -> bool:
        """Whether x, [rows, size], is summed here. The same on all ranks, as it follows from shape and dtype."""
        if x.dim() != 2 or x.shape[0] > self._most_rows or not x.is_contiguous() or x.dtype not in DTYPES:
            return False
        words, rest = divmod(x.shape[1] * x.element_size(), 4)
        return not rest and words <= self.width

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' x in a new tensor, in fp32 and rounded once, the same bits on all of them."""
        from multilora.distributed import triton_exchange

        return triton_exchange.all_reduce(x, self.buffers, self.counts, self.stop, self.rank, self.width)

    def fits_gathering(self, x: torch.Tensor) -> bool:
        """Whether x, [rows, part], is gathered here. The same on all ranks."""
        return x.dtype == torch.float32 and x.is_contiguous() and 0 < x.numel() <= self._gathered

    def gather_columns(self, x: torch.Tensor, columns: int) -> torch.Tensor:
        """See `Group.gather_columns`."""
        from multilora.distributed import triton_gather

        return triton_gather.gather_columns(
            x, columns, self.gather_buffers, self.gather_counts, self.stop, self.rank, self._gathered
        )

    def close(self) -> None:
        """Have kernels that wait for another rank come to an end; their results are of no use. Any thread."""
        self.stop.fill_(1)


def make_exchange(store: c10d.Store, rank: int, size: int, device: torch.device) -> Exchange:
    """Wait for all ranks; `device` is the current one. Raises ConfigError where they cannot reach each other."""
    from multilora.distributed.triton_gather import FLAG_BYTES

    gathers = have_atomics(store, rank, size)  # which raise its flags; sums do without
    if not gathers:
        logger.info("logits of %d ranks: NCCL gathers them, the devices have no atomics on each other's memory", size)
    nbytes = size * FLAG_BYTES + GATHER_BYTES if gathers else 0
    return Exchange(PeerMemory(store, rank, size, sums_bytes(size) + nbytes), rank, size, device, gathers=gathers)


def sums_bytes(size: int) -> int:
    """How much of a rank's memory sums take."""
    from multilora.distributed.triton_exchange import SLOTS

    return 2 * size * SLOTS * WIDTH * 8
