"""FP8: `quant_method: fp8` (Qwen3-FP8, DeepSeek) and `--quantization fp8`. Weights are held in 8-bit floats.

What is multiplied with them is rounded to 8 bits, too, if the checkpoint says so, with a scale for each row, or for
each row and block of columns; it is a LoRA's business only after that, which sees it in 16 bit. A rank that holds a
part of the inputs scales its part of a row.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.weights.base import ExpertsFormat, ExpertsWeight, Share, Stored, Weight, WeightFormat
from multilora.layers.weights.fp8_arithmetic import (
    E4M3,
    blocks_product,
    dequantise,
    quantise,
    rows_product,
    saturated,
)
from multilora.layers.weights.methods import check_fields, served
from multilora.layers.weights.plain import NOISE, PLAIN, WeightFormats
from multilora.layers.weights.skipped import is_of_experts, skips

STORED = ("F8_E4M3",)
SCALES = ("F32", "BF16", "F16", "F8_E8M0")


class Activations(StrEnum):
    """How what is multiplied with a weight is rounded to 8 bits."""

    DYNAMIC = "dynamic"  # each row by its own largest number
    STATIC = "static"  # all by a scale of the checkpoint
    NONE = "none"  # not at all


@dataclass(frozen=True)
class Fp8Rows(ExpertsFormat):
    """One scale for each row, or for all of a matrix.

    scale_names: what a checkpoint may call it, if it is quantised already; empty: it is quantised while it is loaded.
    per_row: whether a checkpoint has one for each row. input_scales: the same of what is multiplied with it.
    """

    scale_names: tuple[str, ...] = ()
    per_row: bool = False
    activations: Activations = Activations.DYNAMIC
    input_scales: tuple[str, ...] = ()

    shards = True

    @property
    def name(self) -> str:
        rows = "rows" if self.per_row or not self.scale_names else "tensors"
        return f"fp8 by {rows}, activations {self.activations}"

    def make(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype) -> Weight:
        return Fp8RowsWeight(self, out_features, in_features, device=device, dtype=dtype)

    def merges(self, widths: Sequence[int]) -> bool:  # noqa: ARG002 - the contract's
        """Given scales of what is multiplied are those of one matrix."""
        return self.activations is not Activations.STATIC

    def make_experts(
        self, experts: int, parts: Sequence[int], in_features: int, *, device: torch.device, dtype: torch.dtype
    ) -> ExpertsWeight:
        from multilora.layers.weights.fp8_experts import Fp8RowsExperts

        return Fp8RowsExperts(self, experts, parts, in_features, device=device, dtype=dtype)


class _Fp8Weight(Weight):
    """What the weights of this file have in common: e4m3 numbers and scales, which are NaN until they are loaded."""

    def __init__(self, shape: tuple[int, int], scales: tuple[int, int], *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype
        self.data = nn.Parameter(torch.empty(shape, device=device, dtype=E4M3), requires_grad=False)  # [out, in]
        scale = torch.full(scales, torch.nan, device=device)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def check_filled(self) -> None:
        if self.scale.isnan().any():
            raise ModelUnsupported("the checkpoint has no scale for its fp8 weight, or one that is no number")

    def _noise(self, generator: torch.Generator, rows: slice) -> torch.Tensor:
        return torch.randn(self.data[rows].shape, generator=generator, device=self.data.device).mul_(NOISE)

    def _pieces(self) -> Iterable[slice]:
        """Rows that are filled with noise at a time, which takes memory of four times as many bytes, and more."""
        return (slice(len(self.data)),)


class Fp8RowsWeight(_Fp8Weight):
    """See `Fp8Rows`."""

    def __init__(
        self, kind: Fp8Rows, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype
    ):
        super().__init__((out_features, in_features), (out_features, 1), device=device, dtype=dtype)
        self._kind = kind
        if kind.activations is Activations.STATIC:
            scale = torch.full((1, 1), torch.nan, device=device)
            self.input_scale = nn.Parameter(scale, requires_grad=False)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._kind.activations is Activations.NONE:
            return nn.functional.linear(x, self.dequantised(slice(None)), bias)
        if self._kind.activations is Activations.STATIC:
            q = saturated(x.float() / self.input_scale)
            scale = self.input_scale.expand(len(x), 1).contiguous()
        else:
            q, scale = quantise(x)
        y = rows_product(q, scale, self.data, self.scale, x.dtype)
        return y if bias is None else y.add_(bias)

    def dequantised(self, rows: slice) -> torch.Tensor:
        return dequantise(self.data[rows], self.scale[rows]).to(self.dtype)

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:  # noqa: ARG002 - the contract's
        kind, shape = self._kind, (share.out_features, share.in_features)
        if not kind.scale_names:
            return {"weight": Stored(shape, part=(share.outputs, share.inputs))}
        found = {"weight": Stored(shape, STORED, part=(share.outputs, share.inputs))}
        optional = len(kind.scale_names) > 1
        for name in kind.scale_names:
            whole = Stored(None, SCALES, optional=optional)
            by_row = Stored((share.out_features, 1), SCALES, (share.outputs, range(1)), optional)
            found[name] = by_row if kind.per_row else whole
        for name in kind.input_scales:
            found[name] = Stored(None, SCALES, optional=True)
        return found

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        if name in self._kind.scale_names:
            self.scale[rows] = _scale(name, tensor, self.scale[rows].shape).to(self.scale.device)
        elif name in self._kind.input_scales:
            if self._kind.activations is Activations.STATIC:
                self.input_scale.copy_(_scale(name, tensor, torch.Size((1, 1))))
        elif self._kind.scale_names:
            self.data[rows] = tensor.to(self.data.device)
        else:
            self.data[rows], self.scale[rows] = quantise(tensor.to(self.data.device))

    def randomise(self, generator: torch.Generator) -> None:
        for rows in self._pieces():
            self.data[rows], self.scale[rows] = quantise(self._noise(generator, rows))
        if self._kind.activations is Activations.STATIC:
            self.input_scale.fill_(1 / 64)

    def check_filled(self) -> None:
        super().check_filled()
        if self._kind.activations is Activations.STATIC and self.input_scale.isnan().any():
            raise ModelUnsupported(
                f"the checkpoint has no {' or '.join(self._kind.input_scales)}, which static scales are"
            )


@dataclass(frozen=True)
class Fp8Blocks(ExpertsFormat):
    """One scale for each block of rows and columns; what is multiplied has one for each row and such columns."""

    scale_name: str
    block: tuple[int, int] = (128, 128)
    activations: Activations = Activations.DYNAMIC

    shards = True

    @property
    def name(self) -> str:
        return f"fp8 in blocks of {self.block[0]} x {self.block[1]}, activations {self.activations}"

    def make(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype) -> Weight:
        return Fp8BlocksWeight(self, out_features, in_features, device=device, dtype=dtype)

    def merges(self, widths: Sequence[int]) -> bool:
        """If no block is in two of them."""
        return all(width % self.block[0] == 0 for width in widths[:-1])

    def make_experts(
        self, experts: int, parts: Sequence[int], in_features: int, *, device: torch.device, dtype: torch.dtype
    ) -> ExpertsWeight:
        from multilora.layers.weights.fp8_experts import Fp8BlocksExperts

        return Fp8BlocksExperts(self, experts, parts, in_features, device=device, dtype=dtype)


class Fp8BlocksWeight(_Fp8Weight):
    """See `Fp8Blocks`."""

    def __init__(
        self, kind: Fp8Blocks, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype
    ):
        scales = -(-out_features // kind.block[0]), -(-in_features // kind.block[1])
        super().__init__((out_features, in_features), scales, device=device, dtype=dtype)
        self._kind = kind

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._kind.activations is Activations.NONE:
            return nn.functional.linear(x, self.dequantised(slice(None)), bias)
        q, scale = quantise(x, self._kind.block[1])
        y = blocks_product(q, scale, self.data, self.scale, self._kind.block, x.dtype)
        return y if bias is None else y.add_(bias)

    def dequantised(self, rows: slice) -> torch.Tensor:
        rows = slice(*rows.indices(len(self.data))[:2])
        return dequantise(self.data[rows], self.scale[self._blocks(rows)], self._kind.block).to(self.dtype)

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:  # noqa: ARG002 - the contract's
        (high, wide), name = self._kind.block, self._kind.scale_name
        parts = (
            _blocks_of(share.outputs, high, share.out_features),
            _blocks_of(share.inputs, wide, share.in_features),
        )
        shape = -(-share.out_features // high), -(-share.in_features // wide)
        return {
            "weight": Stored((share.out_features, share.in_features), STORED, (share.outputs, share.inputs)),
            name: Stored(shape, SCALES, parts),
        }

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        if name == self._kind.scale_name:
            self.scale[self._blocks(rows)] = tensor.float().to(self.scale.device)
        else:
            self.data[rows] = tensor.to(self.data.device)

    def randomise(self, generator: torch.Generator) -> None:
        self.scale.fill_(NOISE / 64)
        for rows in self._pieces():
            self.data[rows] = saturated(self._noise(generator, rows) * (64 / NOISE))

    def _blocks(self, rows: slice) -> slice:
        """The rows of the scales of these rows, which begin with a block."""
        high = self._kind.block[0]
        return slice(rows.start // high, -(-rows.stop // high))


def _scale(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """fp32 of this shape, [rows, 1], from one scale for all, or one for each row."""
    if tensor.numel() not in (1, shape[0]):
        raise ModelUnsupported(f"{name} has {tensor.numel()} numbers for {shape[0]} rows")
    return tensor.float().reshape(-1, 1).expand(shape)


def _blocks_of(part: range, size: int, entire: int) -> range:
    """The blocks that these rows or columns are. Raises ConfigError if they are none."""
    if part.start % size or (part.stop % size and part.stop != entire):
        raise ConfigError(f"--tp-size: ranks would divide fp8 blocks of {size}, in a matrix of {entire}")
    return range(part.start // size, -(-part.stop // size))


class Fp8:
    """See `Method`."""

    def read(self, config: dict[str, Any]) -> WeightFormats:
        known = ("activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers", "scale_fmt")
        check_fields(config, (*known, "fmt", "dequantize", "is_checkpoint_fp8_serialized", "kv_cache_scheme"))
        served(config, "fmt", ("e4m3", "float8_e4m3fn"))
        skipped = skips(config.get("modules_to_not_convert") or config.get("ignored_layers"))
        if config.get("is_checkpoint_fp8_serialized") is False:
            return _made(Fp8Rows(), skipped)
        scheme = Activations(served(config, "activation_scheme", ("dynamic", "static")))
        block = config.get("weight_block_size")
        if block is None:
            names = ("weight_scale_inv", "weight_scale"), False, scheme, ("input_scale", "activation_scale")
            return _formats(Fp8Rows(*names), skipped)
        if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise ModelUnsupported(f"quantization_config: weight_block_size = {block!r:.80}: expected two sizes")
        if scheme is Activations.STATIC:
            raise ModelUnsupported("quantization_config: activation_scheme = 'static' with blocks is not supported")
        return _formats(Fp8Blocks("weight_scale_inv", (block[0], block[1])), skipped)

    def quantise(self) -> WeightFormats:
        return _made(Fp8Rows(), lambda _path: False)


def _formats(kind: WeightFormat, skipped: Callable[[str], bool]) -> WeightFormats:
    return WeightFormats(kind.name, lambda path: PLAIN if skipped(path) else kind)


def _made(kind: WeightFormat, skipped: Callable[[str], bool]) -> WeightFormats:
    """The formats of what is quantised while it is loaded: of experts, those of native mixtures; no router."""
    others = _formats(kind, lambda path: skipped(path) or is_of_experts(path))
    return WeightFormats(kind.name, others.choose, _formats(kind, skipped).choose)


METHOD = Fp8()
