"""Copies between host and device that do not drain the stream, as plain `torch.tensor(..., device="cuda")` would.

All of them go through pinned memory, which PyTorch's host allocator reuses only after the copy has run: from ordinary
memory CUDA copies more than 64 KiB only after all that was queued before has finished.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """A new tensor on `device`, copied on the current stream: int64 from a list, a tensor in its own dtype."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def upload_into(target: Tensor, values: np.ndarray) -> None:
    """Copy `values` into `target`, of the same shape and dtype, on the current stream."""
    source = torch.from_numpy(values)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """Start a copy to pinned host memory, valid once a `Fence` made afterwards has passed. On CPU: the tensor."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Fence:
    """A point in the device's stream of work."""

    def __init__(self, device: torch.device):
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Block until everything queued before the fence was made has finished."""
        if self._event is not None:
            self._event.synchronize()
