"""AWQ: integers of 4 bits, packed along the outputs, with a scale and a zero point for each group of inputs.

Layout of a matrix with `in` inputs and `out` outputs ("gemm"):

    qweight  int32 [in, out / 8]       integer i of a word is output 8 · column + ORDER[i]
    qzeros   int32 [groups, out / 8]   the same
    scales   fp16  [groups, out]

Written by AutoAWQ and llm-awq's converters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from multilora.layers.weights.base import Share, Stored
from multilora.layers.weights.gptq import served_group
from multilora.layers.weights.integer_format import IntegerFormat
from multilora.layers.weights.integers import (
    SCALES,
    WORD,
    WORDS,
    GroupedIntegers,
    check_divides,
    part_of,
    unpack,
    words_of,
)
from multilora.layers.weights.methods import check_fields, not_made, served
from multilora.layers.weights.plain import PLAIN, WeightFormats
from multilora.layers.weights.skipped import skips

BITS = 4
PER_WORD = WORD // BITS
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs stand in a word, from its lowest bits on."""


@dataclass(frozen=True)
class Awq(IntegerFormat):
    """group: inputs that share a scale; None: all do."""

    group: int | None
    bits: int = BITS

    @property
    def name(self) -> str:
        return f"awq in {self.bits} bit"

    def stored(self, share: Share) -> dict[str, Stored]:
        outs, width = share.out_features, share.in_features
        check_divides("awq outputs", outs, PER_WORD)
        check_divides("awq inputs", width, self.group or width)
        count, groups, outputs = self.count(width), self.groups(share), share.outputs
        out_words = words_of("awq outputs", outputs, PER_WORD, outs)
        return {
            "qweight": Stored((width, outs // PER_WORD), WORDS, part_of(share, share.inputs, out_words)),
            "qzeros": Stored((count, outs // PER_WORD), WORDS, part_of(share, groups, out_words)),
            "scales": Stored((count, outs), SCALES, part_of(share, groups, outputs)),
        }

    def integers(self, tensors: Mapping[str, torch.Tensor], share: Share) -> GroupedIntegers:
        numbers, zeros, scales = _ordered(tensors["qweight"]), _ordered(tensors["qzeros"]), tensors["scales"].float()
        return GroupedIntegers(numbers.T, zeros.T, scales.T, self.group_of_inputs(share, numbers.device))


def _ordered(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, n] of words to int32 [rows, n · 8], outputs in their own order."""
    places = torch.tensor(ORDER, device=words.device).argsort()  # where each output stands
    return unpack(words, BITS).view(len(words), -1, PER_WORD)[..., places].flatten(1)


class AwqMethod:
    """See `Method`."""

    def read(self, config: dict[str, Any]) -> WeightFormats:
        known = ("bits", "group_size", "version", "zero_point", "modules_to_not_convert", "backend", "do_fuse")
        check_fields(config, (*known, "modules_to_fuse", "fuse_max_seq_len", "exllama_config"))
        served(config, "bits", (BITS,))
        served(config, "version", ("gemm", "GEMM", "exllama"))
        served(config, "zero_point", (True,))
        kind, skipped = Awq(served_group(config)), skips(config.get("modules_to_not_convert"))
        return WeightFormats(kind.name, lambda path: PLAIN if skipped(path) else kind)

    def quantise(self) -> WeightFormats:
        raise not_made("awq")


METHOD = AwqMethod()
