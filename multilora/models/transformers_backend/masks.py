"""What an attention mask of transformers means, found out without weights.

A model asks for its masks by functions of two positions. While it is examined, such a function is tried on positions
where causal and windowed masks differ, and its meaning travels with the mask through the model's own slicing, until
an attention layer hands it over. Called by `probe.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FAR = 1 << 15
"""Positions up to which a mask without a window is tried."""


@dataclass(frozen=True)
class MaskMeaning:
    """What a query sees of the tokens up to itself. window: so many, itself included; None: all of them.

    obstacle: why the mask is neither of the two; "": it is.
    """

    window: int | None = None
    obstacle: str = ""


KEEPING = frozenset(
    {
        torch.Tensor.__getitem__,
        torch.Tensor.to,
        torch.Tensor.bool,
        torch.Tensor.clone,
        torch.Tensor.contiguous,
        torch.Tensor.expand,
        torch.Tensor.narrow,
        torch.Tensor.view,
        torch.Tensor.detach,
    }
)
"""Operations after which a mask means the same."""


class MarkedMask(torch.Tensor):
    """A mask on the meta device that knows its meaning. What computes with it gets a plain tensor."""

    meaning: MaskMeaning

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if func in KEEPING and isinstance(args[0], MarkedMask) and isinstance(found, torch.Tensor):
            marked = found.as_subclass(cls)
            marked.meaning = args[0].meaning
            return marked
        return found


def marked_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    **_: Any,
) -> torch.Tensor:
    """The mask interface of transformers, for an examination: a mask of the right shape that knows its meaning."""
    empty = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask = empty.as_subclass(MarkedMask)
    mask.meaning = meaning_of(mask_function, local_size)
    return mask


def meaning_of(mask_function: Callable[..., Any], local_size: int | None) -> MaskMeaning:
    """mask_function: (batch, head, query, key) → whether the query sees the key. local_size: the window, if any."""
    try:
        if _equals(mask_function, None):
            return MaskMeaning()
        if local_size is not None:
            for window in (local_size, local_size + 1):
                if _equals(mask_function, window):
                    return MaskMeaning(window)
    except (RuntimeError, IndexError, NotImplementedError) as e:
        return MaskMeaning(obstacle=f"its mask depends on the batch ({type(e).__name__})")
    return MaskMeaning(obstacle="its mask is neither causal nor a sliding window over causal")


def _equals(mask_function: Callable[..., Any], window: int | None) -> bool:
    """Whether the mask is causal with this window, at the positions where such masks differ."""
    size = window or 64
    queries = sorted({*range(8), *(max(0, n * size + d) for n in (1, 2, 3) for d in range(-3, 4)), FAR})
    device = torch.device("cpu")
    with torch.device(device):
        zero = torch.tensor(0)
        for query in queries:
            near = {*range(8), *(query + d for d in range(-8, 9)), *(query - size + d for d in range(-3, 4))}
            key = torch.tensor(sorted(k for k in near if k >= 0))
            seen = mask_function(zero, zero, torch.tensor(query), key)
            expected = (key <= query) if window is None else (key <= query) & (key > query - window)
            if not torch.equal(torch.as_tensor(seen).expand_as(expected), expected):
                return False
    return True
