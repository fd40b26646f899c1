"""Host numbers to the device without waiting for it: plain `torch.tensor(..., device="cuda")` drains the stream."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """int64 from a list, or the tensor as it is; CUDA copies pageable memory aside before the call returns."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    return host.to(device, non_blocking=True)
