"""GPTQ: integers of 4 or 8 bits, packed along the inputs, with a scale and a zero point for each group of inputs.

Layout of a matrix with `in` inputs and `out` outputs, `p` integers in a word of 32 bits:

    qweight  int32 [in / p, out]       integer i of a word is input p · row + i
    qzeros   int32 [groups, out / p]   the same along the outputs; in the older format each is one too small
    scales   fp16  [groups, out]
    g_idx    int32 [in]                the group of an input: any order, with `desc_act`

Written by AutoGPTQ and GPTQModel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from multilora.errors import ModelUnsupported
from multilora.layers.weights.base import FLOATS, Share, Stored
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
from multilora.layers.weights.skipped import ends_with

HARMLESS = (
    "sym", "static_groups", "true_sequential", "damp_percent", "damp_auto_increment", "dataset",
    "tokenizer", "model_name_or_path", "model_file_base_name", "batch_size", "block_name_to_quantize",
    "model_seqlen", "use_exllama", "use_cuda_fp16", "exllama_config", "max_input_length",
    "cache_block_outputs", "module_name_preceding_first_block", "pad_token_id", "disable_exllama", "meta",
    "mse", "act_group_aware", "hyb_act", "rotation", "pack_impl", "backend",
)  # fmt: skip
"""How the integers were found, and what other programs do with them."""


@dataclass(frozen=True)
class Gptq(IntegerFormat):
    """offset: what is added to stored zero points; ordered: the inputs of a group are neighbours."""

    bits: int
    group: int | None
    offset: int
    ordered: bool = True

    @property
    def name(self) -> str:
        return f"gptq in {self.bits} bit"

    @property
    def any_order(self) -> bool:
        return not self.ordered

    @property
    def unshared_inputs(self) -> str | None:
        return "desc_act orders inputs across the ranks' parts" if self.any_order else None

    def stored(self, share: Share) -> dict[str, Stored]:
        per_word, outs, width = WORD // self.bits, share.out_features, share.in_features
        check_divides("gptq inputs", width, per_word)
        check_divides("gptq outputs", outs, per_word)
        count, groups, outputs, inputs = self.count(width), self.groups(share), share.outputs, share.inputs
        out_words = words_of("gptq outputs", outputs, per_word, outs)
        in_words = words_of("gptq inputs", inputs, per_word, width)
        return {
            "qweight": Stored((width // per_word, outs), WORDS, part_of(share, in_words, outputs)),
            "qzeros": Stored((count, outs // per_word), WORDS, part_of(share, groups, out_words)),
            "scales": Stored((count, outs), SCALES, part_of(share, groups, outputs)),
            "g_idx": Stored((width,), WORDS, part_of(share, inputs)),
            "bias": Stored((outs,), FLOATS, part_of(share, outputs), optional=True),
        }

    def integers(self, tensors: Mapping[str, torch.Tensor], share: Share) -> GroupedIntegers:
        held = self.groups(share)
        group = tensors["g_idx"].long() - held.start  # [in]
        numbers = unpack(tensors["qweight"].T.contiguous(), self.bits)  # [out, in]
        most = (1 << self.bits) - 1
        zeros = (unpack(tensors["qzeros"], self.bits) + self.offset) & most  # [groups, out]
        scales = tensors["scales"].float()
        low, high = int(group.min()) + held.start, int(group.max()) + held.start
        if not held.start <= low <= high < held.stop:
            number = high if high >= held.stop else low
            where = "" if share.is_whole else f", where a rank's inputs have groups {held.start} to {held.stop - 1}"
            raise ModelUnsupported(f"g_idx names group {number} of {self.count(share.in_features)}{where}")
        return GroupedIntegers(numbers, zeros.T, scales.T, group)

    def check_spare(self, name: str, tensor: torch.Tensor) -> None:
        """AutoGPTQ writes a bias for every layer, of zeros where the model has none."""
        if tensor.any():
            raise ModelUnsupported(f"{name} is not zero, and the model has none")


class GptqMethod:
    """See `Method`."""

    def read(self, config: dict[str, Any]) -> WeightFormats:
        known = (
            "bits",
            "group_size",
            "checkpoint_format",
            "desc_act",
            "pack_dtype",
            "modules_in_block_to_quantize",
            "lm_head",
        )
        check_fields(config, (*known, "format", *HARMLESS))
        bits = served(config, "bits", (4, 8))
        served(config, "pack_dtype", ("int32",))
        served(config, "lm_head", (False,))
        layout = "format" if config.get("checkpoint_format") is None else "checkpoint_format"
        older = served(config, layout, ("gptq", "gptq_v2")) == "gptq"
        group = served_group(config)
        kind = Gptq(bits, group, int(older), ordered=not config.get("desc_act"))
        inside = config.get("modules_in_block_to_quantize")
        if not inside:
            return WeightFormats(kind.name, lambda _path: kind)
        is_quantised = ends_with(name for names in inside for name in ([names] if isinstance(names, str) else names))
        return WeightFormats(kind.name, lambda path: kind if is_quantised(path) else PLAIN)

    def quantise(self) -> WeightFormats:
        raise not_made("gptq")


def served_group(config: dict[str, Any]) -> int | None:
    """`group_size`; None: one group. Raises ModelUnsupported."""
    size = config.get("group_size", -1)
    if type(size) is not int or not (size == -1 or size > 0):
        raise ModelUnsupported(f"quantization_config: group_size = {size!r:.80}: expected a number of inputs, or -1")
    return None if size == -1 else size


METHOD = GptqMethod()
