"""The formats of packed integers: held packed where the device multiplies with 4 bits, else dequantised, and the log
says which and why."""

import functools
import logging
from collections.abc import Sequence

import torch

from multilora.layers.weights import int4_grouped
from multilora.layers.weights.base import ExpertsFormat, ExpertsWeight, Share, Weight
from multilora.layers.weights.int4 import Int4Weight
from multilora.layers.weights.int4_arithmetic import OUTS, obstacle
from multilora.layers.weights.int4_experts import Int4Experts
from multilora.layers.weights.integers import IntegerLayout
from multilora.layers.weights.unpacked import UnpackedExperts, UnpackedWeight

logger = logging.getLogger(__name__)


class IntegerFormat(IntegerLayout, ExpertsFormat):
    """Makes weights from what `IntegerLayout` reads. A rank holds whole words, and packed whole groups."""

    shards = True

    def make(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype) -> Weight:
        reason = f"{self.bits} bits do not stay packed"
        if self.bits == 4:
            group = self.group or in_features
            found = obstacle(device, dtype, out_features, in_features, group)
            if found is None:
                _say(f"{self.name}: held packed")
                return Int4Weight(self, out_features, in_features, device=device)
            reason = found
        _say(f"{self.name}: held dequantised, with the memory of 16 bit: {reason}")
        return UnpackedWeight(self, out_features, in_features, device=device, dtype=dtype)

    def make_experts(
        self, experts: int, parts: Sequence[int], in_features: int, *, device: torch.device, dtype: torch.dtype
    ) -> ExpertsWeight:
        for outs in parts:
            self.stored(Share.whole(outs, in_features))  # raises for sizes that it has no words for
        height, reason = sum(parts), self._obstacle_of_experts(in_features, device, dtype)
        if reason is None:
            _say(f"experts in {self.name}: held packed")
            return Int4Experts(self, experts, height, in_features, device=device)
        _say(f"experts in {self.name}: held dequantised, with the memory of 16 bit: {reason}")
        return UnpackedExperts(self, experts, height, in_features, device=device, dtype=dtype)

    def _obstacle_of_experts(self, width: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """What keeps them from staying packed; None: nothing does."""
        if self.bits != 4:
            return f"{self.bits} bits do not stay packed"
        if self.any_order:
            return "the inputs of a group need not be neighbours (desc_act), and each expert has an order of its own"
        return int4_grouped.obstacle(device, dtype, width, self.group or width)

    def merges(self, widths: Sequence[int]) -> bool:
        """Matrices below each other are packed one by one, and read the same inputs in the same order."""
        return not self.any_order and all(width % max(OUTS.values()) == 0 for width in widths)


@functools.cache
def _say(what: str) -> None:
    """Log it, once for each case."""
    logger.info("%s", what)
