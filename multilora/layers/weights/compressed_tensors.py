"""compressed-tensors (llm-compressor): FP8 by rows, tensors or blocks, and integers of 4 or 8 bits in words of 32.

Groups of modules have a scheme each: what their weights are rounded to, and what is multiplied with them. FP8 is held
as `fp8.py` holds it. Packed integers have inputs in 16 bit ("pack-quantized"):

    weight_packed      int32 [out, in / p]       integer i of a word is input p · column + i, plus 2^(bits - 1)
    weight_scale             [out, groups]
    weight_zero_point  int32 [out / p, groups]   packed along the outputs; if not symmetric
    weight_g_idx       int32 [in]                the group of an input, with `actorder: group`
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from multilora.errors import ModelUnsupported
from multilora.kernels.integers import cdiv
from multilora.layers.weights.base import Share, Stored, WeightFormat
from multilora.layers.weights.fp8 import Activations, Fp8Blocks, Fp8Rows
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

PREFIX = "quantization_config: "


@dataclass(frozen=True)
class PackedIntegers(IntegerFormat):
    """group: inputs that share a scale; None: all do. ordered: they are neighbours; else weight_g_idx says."""

    bits: int
    group: int | None
    symmetric: bool
    ordered: bool

    @property
    def name(self) -> str:
        return f"compressed-tensors in {self.bits} bit"

    @property
    def any_order(self) -> bool:
        return not self.ordered

    @property
    def unshared_inputs(self) -> str | None:
        return "actorder orders inputs across the ranks' parts" if self.any_order else None

    def stored(self, share: Share) -> dict[str, Stored]:
        per_word, outs, width = WORD // self.bits, share.out_features, share.in_features
        check_divides("packed inputs", width, self.group or width)
        count, groups, outputs, inputs = self.count(width), self.groups(share), share.outputs, share.inputs
        in_words = words_of("packed inputs", inputs, per_word, width)
        found = {
            "weight_packed": Stored((outs, cdiv(width, per_word)), WORDS, part_of(share, outputs, in_words)),
            "weight_scale": Stored((outs, count), SCALES, part_of(share, outputs, groups)),
            "weight_shape": Stored((2,), ("I64", "I32")),
        }
        if not self.symmetric:
            out_words = words_of("packed outputs", outputs, per_word, outs)
            found["weight_zero_point"] = Stored(
                (cdiv(outs, per_word), count), WORDS, part_of(share, out_words, groups)
            )
        if not self.ordered:
            found["weight_g_idx"] = Stored((width,), WORDS, part_of(share, inputs))
        return found

    def integers(self, tensors: Mapping[str, torch.Tensor], share: Share) -> GroupedIntegers:
        if (found := tensors["weight_shape"].tolist()) != [share.out_features, share.in_features]:
            raise ModelUnsupported(f"weight_shape: {found}, expected {[share.out_features, share.in_features]}")
        outs, width = len(share.outputs), len(share.inputs)
        scales = tensors["weight_scale"].float()
        numbers = unpack(tensors["weight_packed"], self.bits)[:, :width]
        group = self.group_of_inputs(share, numbers.device) if self.ordered else tensors["weight_g_idx"].long()
        if self.symmetric:
            zeros = torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.int32, device=numbers.device)
        else:  # with the same offset
            zeros = unpack(tensors["weight_zero_point"].T.contiguous(), self.bits)[:, :outs].T
        return GroupedIntegers(numbers, zeros, scales, group)


class CompressedTensors:
    """See `Method`."""

    def read(self, config: dict[str, Any]) -> WeightFormats:
        known = ("config_groups", "format", "ignore", "quantization_status", "kv_cache_scheme")
        check_fields(config, (*known, "global_compression_ratio", "version", "run_compressed", "sparsity_config"))
        served(config.get("sparsity_config") or {}, "format", ("dense",))
        served(config, "quantization_status", ("compressed", "frozen"))
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ModelUnsupported(f"{PREFIX}config_groups = {groups!r:.80}: expected an object")
        schemes = [(_targets(scheme), _format(scheme, config.get("format"))) for scheme in groups.values()]
        ignored = tuple(config.get("ignore") or ())

        def choose(path: str) -> WeightFormat:
            if any(_names(pattern, path) for pattern in ignored):
                return PLAIN
            for targets, kind in schemes:
                if any(_names(pattern, path) for pattern in targets):
                    return kind
            return next((kind for targets, kind in schemes if "Linear" in targets), PLAIN)

        return WeightFormats(", ".join(dict.fromkeys(kind.name for _, kind in schemes)), choose)

    def quantise(self) -> WeightFormats:
        raise not_made("compressed-tensors")


def _names(pattern: str, path: str) -> bool:
    """Whether a name or an expression (`re:…`) of compressed-tensors is that of this module."""
    return re.match(pattern[3:], path) is not None if pattern.startswith("re:") else pattern == path


def _targets(scheme: dict[str, Any]) -> tuple[str, ...]:
    return tuple(scheme.get("targets") or ())


def _format(scheme: dict[str, Any], layout: Any) -> WeightFormat:
    """How the matrices of a scheme are held. Raises ModelUnsupported naming what is not served."""
    weights, inputs = scheme.get("weights"), scheme.get("input_activations")
    if not isinstance(weights, dict):
        raise ModelUnsupported(f"{PREFIX}weights = {weights!r:.80} of a scheme: expected an object")
    if scheme.get("output_activations") is not None:
        raise ModelUnsupported(f"{PREFIX}output_activations are not supported")
    layout = scheme.get("format") or layout
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    if kind == "float" and bits == 8 and layout in ("float-quantized", "naive-quantized"):
        return _floats(weights, inputs)
    if kind == "int" and bits in (4, 8) and layout == "pack-quantized" and inputs is None:
        return _integers(weights)
    rounded = "16-bit" if inputs is None else f"{inputs.get('num_bits')}-bit {inputs.get('type')}"
    raise ModelUnsupported(
        f"{PREFIX}format {layout!r} with {bits}-bit {kind} weights and {rounded} activations is not supported; "
        "served: float-quantized with 8 bit, pack-quantized with 4 or 8 bit and 16-bit activations"
    )


def _floats(weights: dict[str, Any], inputs: dict[str, Any] | None) -> WeightFormat:
    activations = Activations.NONE
    if inputs is not None:
        if (inputs.get("type"), inputs.get("num_bits")) != ("float", 8):
            found = f"{inputs.get('num_bits')}-bit {inputs.get('type')}"
            raise ModelUnsupported(f"{PREFIX}{found} activations of fp8 weights are not supported")
        activations = Activations.DYNAMIC if inputs.get("dynamic") else Activations.STATIC
    strategy = served(weights, "strategy", ("tensor", "channel", "block"))
    if strategy == "block":
        high, wide = weights.get("block_structure") or (128, 128)
        if activations is Activations.STATIC:
            raise ModelUnsupported(f"{PREFIX}static activations with blocks are not supported")
        return Fp8Blocks("weight_scale", (int(high), int(wide)), activations)
    given = ("input_scale",) if activations is Activations.STATIC else ()
    return Fp8Rows(("weight_scale",), strategy == "channel", activations, given)


def _integers(weights: dict[str, Any]) -> WeightFormat:
    strategy = served(weights, "strategy", ("group", "channel"))
    order = served(weights, "actorder", (None, "static", "weight", "group", False))
    group = weights.get("group_size") if strategy == "group" else None
    symmetric = bool(weights.get("symmetric", True))
    return PackedIntegers(weights["num_bits"], group, symmetric, ordered=order != "group")


METHOD = CompressedTensors()
