"""The skeleton of the LoRA backends in plain torch: one segment and one adapter at a time.

`reference.py` and `torch_backend.py` say what one adapter adds to the rows of one segment; this file owns the rest of
the contract in `base.py`.
"""

import torch

from multilora.batch import ExpertRows, LoraSegment
from multilora.lora.base import Activation
from multilora.lora.table import LoraTable, SiteWeights
from multilora.transfer import upload


class SegmentLoop:
    """A `LoraBackend` whose subclasses implement `add`. No graph can be captured: the loop follows the segments."""

    name: str
    replayable = False

    def __init__(self, table: LoraTable):
        self.table = table
        self._segments: tuple[LoraSegment, ...] = ()
        self._num_rows = 0

    def add(self, y: torch.Tensor, x: torch.Tensor, weights: SiteWeights, factor: float) -> None:
        """y += factor · (x Aᵀ) B, then the scale-shift pairs, in place. x: [rows, in]; y: [rows, out]."""
        raise NotImplementedError

    def prepare(
        self,
        segments: tuple[LoraSegment, ...],
        num_rows: int,
        *,
        captured: bool = False,  # noqa: ARG002 - part of the contract, as the next one
        decodes: bool = False,  # noqa: ARG002
    ) -> None:
        """See `LoraBackend`."""
        self._segments = segments
        self._num_rows = num_rows

    def begin(self) -> None:
        """See `LoraBackend`. Nothing runs beside the layer's own product here."""

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        """See `LoraBackend`."""
        self.add_segments(self._segments, y, x, site)

    def add_segments(self, segments: tuple[LoraSegment, ...], y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        """`apply` for some of the step's segments."""
        for segment in segments:
            x_rows, y_rows = x[segment.start : segment.end], y[segment.start : segment.end]
            for slot, factor in zip(segment.slots, segment.weights, strict=True):
                weights = self.table.site(slot, site)
                if weights is not None:
                    self.add(y_rows, x_rows, weights, factor)

    def expert_segments(self) -> torch.Tensor | None:
        """See `LoraBackend`."""
        if not any(self.table.acts_on_experts(slot) for segment in self._segments for slot in segment.slots):
            return None
        numbers = torch.zeros(self._num_rows, dtype=torch.int64)
        for number, segment in enumerate(self._segments, 1):
            numbers[segment.start : segment.end] = number
        return upload(numbers, self.table.weights.device)

    def apply_experts(self, y: torch.Tensor, x: torch.Tensor, site: int, rows: ExpertRows) -> None:
        """See `LoraBackend`."""
        assert rows.segments is not None
        groups = torch.stack((rows.experts, rows.segments), 1)
        found, counts = torch.unique_consecutive(groups, dim=0, return_counts=True)
        start = 0
        for (expert, number), count in zip(found.tolist(), counts.tolist(), strict=True):
            x_rows, y_rows = x[start : start + count], y[start : start + count]
            start += count
            if number:
                segment = self._segments[number - 1]
                for slot, factor in zip(segment.slots, segment.weights, strict=True):
                    weights = self.table.site(slot, site, expert)
                    if weights is not None:
                        self.add(y_rows, x_rows, weights, factor)

    def apply_gated(self, y: torch.Tensor, x: torch.Tensor, site: int, silu_and_mul: Activation) -> torch.Tensor:
        """See `LoraBackend`."""
        self.apply(y, x, site)
        return silu_and_mul(y)
