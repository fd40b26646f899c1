"""A group of ranks and its collectives. `SINGLE` is a group of one, which communicates with nobody, so that layers
need not ask whether there are others.

The process groups are made directly, not registered with `torch.distributed`, whose global state belongs to the
program that this package is used in. Knows neither models nor processes: whoever starts the ranks gives each of them
the same file to meet in.
"""

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C import _distributed_c10d as c10d

from multilora.distributed.exchange import MOST_ROWS, Exchange, make_exchange
from multilora.distributed.partition import padded_part
from multilora.errors import ConfigError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
CLOSE_SECONDS = 3.0

Backend = Any
"""A ProcessGroupGloo or ProcessGroupNCCL. torch's annotations lack their collectives."""


class Group(Protocol):
    """`size` ranks, of which this is number `rank`. Every rank calls the collectives in the same order, with tensors
    of the same shape and dtype."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def exchange(self) -> Exchange | None:
        """What sums small tensors inside other kernels; None: there is none."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' x, the same bits on all of them; may be x itself, changed in place."""
        ...

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The x of every rank, by rank."""
        ...

    def gather_columns(self, x: torch.Tensor, columns: int) -> torch.Tensor:
        """The ranks' x, [rows, part], side by side as `padded_part` cut them: [rows, columns], contiguous."""
        ...

    def minimum(self, value: int) -> int:
        """The least of the ranks' values. Waits for the device."""
        ...

    def close(self) -> None:
        """Leave the group, within seconds. A collective that waits for this rank raises, on the other ranks or, with
        NCCL, on this one. CUDA graphs with collectives are to be dropped before. Any thread."""


class SingleRank:
    """The contract of `Group` for a rank that is alone."""

    rank = 0
    size = 1
    exchange = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]

    def gather_columns(self, x: torch.Tensor, columns: int) -> torch.Tensor:
        assert x.shape[1] == columns, (x.shape, columns)
        return x

    def minimum(self, value: int) -> int:
        return value

    def close(self) -> None: ...


SINGLE = SingleRank()


class ProcessGroup:
    """The contract of `Group` over one of torch's process groups, whose collectives run on `device`."""

    def __init__(
        self, backend: Backend, rank: int, size: int, device: torch.device, exchange: Exchange | None = None
    ):
        self.rank = rank
        self.size = size
        self.exchange = exchange
        self._backend = backend
        self._device = device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.exchange is not None and self.exchange.fits(x):
            return self.exchange.all_reduce(x)
        x = x.contiguous()
        self._backend.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._backend._allgather_base(out, x.contiguous()).wait()  # noqa: SLF001 - the backends' own, without a copy
        return list(out.chunk(self.size))

    def gather_columns(self, x: torch.Tensor, columns: int) -> torch.Tensor:
        if self.exchange is not None and self.exchange.fits_gathering(x):
            return self.exchange.gather_columns(x, columns)
        parts = (part[:, : len(padded_part(columns, i, self.size))] for i, part in enumerate(self.all_gather(x)))
        return torch.cat(list(parts), dim=1)

    def minimum(self, value: int) -> int:
        found = torch.tensor([value], device=self._device)
        options = c10d.AllreduceOptions()
        options.reduceOp = c10d.ReduceOp(c10d.ReduceOp.MIN)
        self._backend.allreduce([found], options).wait()
        return int(found.item())

    def close(self) -> None:
        if self.exchange is not None:
            self.exchange.close()
        backend, self._backend = self._backend, None
        if backend is None or self._device.type != "cuda":  # gloo's connections end with the object
            return
        # NCCL ends what waits on the device at once, but then waits until graphs with its kernels are gone.
        thread = threading.Thread(target=backend.abort, name="nccl-abort", daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            logger.warning("NCCL has not left its group: a CUDA graph still holds it")


def join(
    path: str, rank: int, size: int, device: torch.device, timeout: float, *, custom_all_reduce: bool = True
) -> Group:
    """The group of `size` ranks that meet in the file `path`, which does not exist before; waits until all have come.

    timeout: seconds after which a collective that a rank does not take part in raises RuntimeError;
    custom_all_reduce: on CUDA, sum small tensors by kernels of this package, where the devices reach each other's
    memory. Raises ConfigError if a rank does not come.
    """
    if size == 1:
        return SINGLE
    store = c10d.FileStore(path, size)
    try:
        backend = _BACKENDS[device.type](store, rank, size, timedelta(seconds=timeout))
        custom = custom_all_reduce and device.type == "cuda"
        exchange = _exchange(store, rank, size, device) if custom else None
        group = ProcessGroup(backend, rank, size, device, exchange)
        group.minimum(rank)  # connects, and NCCL's communicator must be there before anything is captured
    except RuntimeError as e:
        raise ConfigError(f"--tp-size {size}: rank {rank} does not reach the others: {e}") from e
    return group


def _exchange(store: c10d.Store, rank: int, size: int, device: torch.device) -> Exchange | None:
    """None: NCCL sums everything, as the log says then; the same on all ranks."""
    if size not in MOST_ROWS:
        logger.info("sums over %d ranks: NCCL does all of them", size)
        return None
    try:
        return make_exchange(store, rank, size, device)
    except ConfigError as e:
        logger.warning("sums over ranks are slower, NCCL does all of them: %s", e.message)
        return None


def _gloo(store: c10d.Store, rank: int, size: int, timeout: timedelta) -> Backend:
    gloo: Any = c10d.ProcessGroupGloo
    options = gloo._Options()  # noqa: SLF001 - torch has no other name for it
    options._devices = [gloo.create_device(hostname=LOOPBACK)]  # noqa: SLF001
    options._timeout = timeout  # noqa: SLF001
    return gloo(store, rank, size, options)


def _nccl(store: c10d.Store, rank: int, size: int, timeout: timedelta) -> Backend:
    nccl: Any = c10d.ProcessGroupNCCL  # absent where torch was built without it
    options = nccl.Options()
    options._timeout = timeout  # noqa: SLF001
    return nccl(store, rank, size, options)


_BACKENDS: dict[str, Callable[[c10d.Store, int, int, timedelta], Backend]] = {"cpu": _gloo, "cuda": _nccl}
"""The backend of collectives, by the type of the device that they run on."""
