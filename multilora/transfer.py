"""Numbers between host and device without draining the stream, as plain `torch.tensor(..., device="cuda")` would."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """int64 from a list, or the tensor as it is. Through pinned memory, which torch uses again once it has been read:
    from ordinary memory CUDA copies more than 64 KiB only after all that was queued has finished."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """Start to copy to pinned host memory: valid once a `Fence` made afterwards has passed. On CPU, the tensor."""
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
        """Until everything queued before the fence was made has finished."""
        if self._event is not None:
            self._event.synchronize()
