"""bitsandbytes in 4 bit (nf4, fp4), what QLoRA trains adapters on: checkpoints, and `--quantization bitsandbytes`.

Every 64 numbers of a matrix, row after row, share the largest of them; those are fp32, or in 8 bit themselves (double
quantisation), 256 of which share one in turn. The package quantises, dequantises and multiplies; it is imported when
a model needs it. Tensors of a matrix in a checkpoint, `n` numbers:

    weight                               uint8 [n / 2, 1]
    weight.absmax                        uint8 or fp32 [n / 64 rounded up]
    weight.quant_map                     fp32 [16], what the 4 bits stand for
    weight.nested_absmax                 fp32 [absmax / 256 rounded up]
    weight.nested_quant_map              fp32 [256]
    weight.quant_state.bitsandbytes__nf4 uint8, JSON: shape, block sizes, the dtype that is dequantised to
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.weights.base import FLOATS, Share, Stored, Weight, WeightFormat
from multilora.layers.weights.methods import check_fields, served
from multilora.layers.weights.plain import NOISE, PLAIN, WeightFormats
from multilora.layers.weights.skipped import is_of_experts, skips

BLOCK, NESTED_BLOCK = 64, 256
STATE = "weight.quant_state.bitsandbytes__"
HARMLESS = (
    "load_in_4bit", "_load_in_4bit", "_load_in_8bit", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype",
)  # fmt: skip
"""They say nothing about 4 bit, or what to compute in, which here is the model's dtype."""


@dataclass(frozen=True)
class FourBit(WeightFormat):
    """kind: nf4 or fp4. nested: double quantisation. part: it is that of ranks' parts (see `FourBitPart`)."""

    kind: str
    nested: bool
    part: bool = False

    shards = True

    def of_ranks(self) -> WeightFormat:
        return replace(self, part=True)

    @property
    def name(self) -> str:
        return f"bitsandbytes {self.kind}" + (", double quantisation" if self.nested else "")

    def make(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype) -> Weight:
        make = FourBitPart if self.part else FourBitWeight
        return make(self, out_features, in_features, device=device, dtype=dtype)

    def merges(self, widths: Sequence[int]) -> bool:  # noqa: ARG002 - the contract's
        """Blocks begin with each matrix, and so does what is shared by them."""
        return False


class FourBitWeight(Weight):
    """See `FourBit`. `_state` is the package's view of these parameters."""

    def __init__(
        self, kind: FourBit, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype
    ):
        super().__init__()
        self._kind, self._dtype, self._shape = kind, dtype, (out_features, in_features)
        self._functional = _package().functional
        numbers = out_features * in_features
        blocks = -(-numbers // BLOCK)

        def parameter(size: int, held: torch.dtype) -> nn.Parameter:
            empty = torch.zeros(size, dtype=held, device=device)
            return nn.Parameter(empty, requires_grad=False)

        self.data = parameter(-(-numbers // 2), torch.uint8)
        self.code = parameter(16, torch.float32)
        self.absmax = parameter(blocks, torch.uint8 if kind.nested else torch.float32)
        if kind.nested:
            self.nested_absmax = parameter(-(-blocks // NESTED_BLOCK), torch.float32)
            self.nested_code = parameter(256, torch.float32)
            self.offset = parameter(1, torch.float32)
        self._scale = self.nested_absmax if kind.nested else self.absmax
        self._scale.fill_(torch.nan)
        self._state = self._view(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = _package().matmul_4bit(x, self.data.view(1, -1), self._state, bias=bias)
        return y

    def dequantised(self, rows: slice) -> torch.Tensor:
        whole: torch.Tensor = self._functional.dequantize_4bit(self.data.view(-1, 1), self._state)
        return whole.to(self.dtype)[rows]

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:  # noqa: ARG002 - the contract's
        """All but the weight are missing where that is not quantised yet."""
        assert share.is_whole, "a part is a `FourBitPart`"
        found = {"weight": Stored(None, ("U8", *FLOATS))}
        for name, param in self._held().items():
            dtype = "U8" if param.dtype == torch.uint8 else "F32"
            found[f"weight.{name}"] = Stored(tuple(param.shape), (dtype,), optional=True)
        found[STATE + self._kind.kind] = Stored(None, ("U8",), optional=True)
        return found

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:  # noqa: ARG002 - all of them
        if name == "weight" and tensor.is_floating_point():
            self._quantise(tensor)
        elif name == "weight":
            if tensor.numel() != self.data.numel():
                raise ModelUnsupported(f"weight holds {tensor.numel()} bytes, the config asks for {len(self.data)}")
            self.data.copy_(tensor.flatten())
        elif name.startswith(STATE):
            self._read_state(json.loads(bytes(tensor.tolist())))
        else:
            self._held()[name.removeprefix("weight.")].copy_(tensor)

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the package dequantises to, before it is rounded to the dtype of the arithmetic."""
        dtype: torch.dtype = self._state.dtype
        return dtype

    def part(self, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the numbers of a share of whole blocks, packed, and what each is scaled with, fp32; both flat."""
        outputs = slice(share.outputs.start, share.outputs.stop)
        inputs = share.inputs
        absmax = self.absmax.data
        if self._kind.nested:
            absmax = self._functional.dequantize_blockwise(absmax, self._state.state2) + self.offset
        packed = self.data.view(share.out_features, -1)[outputs, inputs.start // 2 : inputs.stop // 2]
        scales = absmax.view(share.out_features, -1)[outputs, inputs.start // BLOCK : inputs.stop // BLOCK]
        return packed.flatten(), scales.flatten()

    def _held(self) -> dict[str, nn.Parameter]:
        """What the numbers are scaled with, by the names that checkpoints have for it."""
        found = {"absmax": self.absmax, "quant_map": self.code}
        if self._kind.nested:
            found |= {"nested_absmax": self.nested_absmax, "nested_quant_map": self.nested_code}
        return found

    def randomise(self, generator: torch.Generator) -> None:
        self._quantise(torch.randn(self._shape, generator=generator, device=self.data.device).mul_(NOISE))

    def check_filled(self) -> None:
        if self._scale.isnan().any():
            raise ModelUnsupported("the checkpoint lacks weight.absmax, or what that is scaled with")

    def _quantise(self, tensor: torch.Tensor) -> None:
        """As transformers does it: from the dtype of the arithmetic."""
        whole = tensor.to(self.data.device, self.dtype).contiguous()
        if tuple(whole.shape) != self._shape:
            raise ModelUnsupported(f"weight has shape {list(whole.shape)}, the config asks for {list(self._shape)}")
        packed, state = self._functional.quantize_4bit(
            whole, blocksize=BLOCK, compress_statistics=self._kind.nested, quant_type=self._kind.kind
        )
        self.data.copy_(packed.flatten())
        self.code.copy_(state.code)
        self.absmax.copy_(state.absmax)
        if self._kind.nested:
            self.nested_absmax.copy_(state.state2.absmax)
            self.nested_code.copy_(state.state2.code)
            self.offset.fill_(float(state.offset))
        self._state = self._view(self.dtype)

    def _read_state(self, said: dict[str, Any]) -> None:
        expected: dict[str, Any] = {"quant_type": self._kind.kind, "blocksize": BLOCK, "shape": list(self._shape)}
        if self._kind.nested:
            expected["nested_blocksize"] = NESTED_BLOCK
        for field, value in expected.items():
            if said.get(field) != value:
                raise ModelUnsupported(
                    f"{STATE}{self._kind.kind}: {field} is {said.get(field)!r}, expected {value!r}"
                )
        if self._kind.nested:
            self.offset.fill_(float(said["nested_offset"]))
        self._state = self._view(getattr(torch, said["dtype"]))

    def _view(self, dtype: torch.dtype) -> Any:
        """The package's state over these parameters. dtype: what it dequantises to."""
        state = self._functional.QuantState
        nested = None
        if self._kind.nested:
            nested = state(self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        return state(
            self.absmax,
            shape=torch.Size(self._shape),
            code=self.code,
            blocksize=BLOCK,
            quant_type=self._kind.kind,
            dtype=dtype,
            offset=self.offset[0] if self._kind.nested else None,
            state2=nested,
        )


class FourBitPart(FourBitWeight):
    """A rank's part of a matrix that is quantised as a whole: the same numbers, and what each 64 of them are scaled
    with in fp32, as what is shared by 256 of those crosses the cuts.

    A whole matrix is read, quantised where it is not yet, and cut: one at a time, as a matrix' tensors come one after
    the other.
    """

    def __init__(
        self, kind: FourBit, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype
    ):
        super().__init__(replace(kind, nested=False), out_features, in_features, device=device, dtype=dtype)
        self._stored_as = replace(kind, part=False)
        self._share = Share.whole(out_features, in_features)
        self._whole: list[FourBitWeight] = []  # one, while its tensors come; a list, as it is no module of this one
        self._missing: set[str] = set()

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:  # noqa: ARG002 - all of them
        """Raises ConfigError where a rank's part would begin or end within 64 numbers that are scaled together."""
        if share.in_features % BLOCK or share.inputs.start % BLOCK or len(share.inputs) % BLOCK:
            raise ConfigError(
                f"inputs {share.inputs.start} to {share.inputs.stop} of {share.in_features} of a rank are not whole "
                f"blocks of {BLOCK}, as {self._stored_as.name} has them"
            )
        self._share = share
        return self._stored()

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        if not self._whole:
            self._whole, self._missing = [self._make_whole(self.data.device)], set(self._stored())
        [whole] = self._whole
        whole.load(rows, name, tensor)
        self._missing.discard(name)
        if not self._missing or (name == "weight" and tensor.is_floating_point()):
            data, absmax = whole.part(self._share)
            self.data.copy_(data)
            self.absmax.copy_(absmax)
            self.code.copy_(whole.code)
            self._state = self._view(whole.stored_dtype)
            self._whole = []

    def _make_whole(self, device: torch.device) -> FourBitWeight:
        size = self._share.out_features, self._share.in_features
        return FourBitWeight(self._stored_as, *size, device=device, dtype=self._dtype)

    def _stored(self) -> dict[str, Stored]:
        """What a checkpoint has of the whole matrix."""
        whole = Share.whole(self._share.out_features, self._share.in_features)
        return self._make_whole(torch.device("meta")).tensors(slice(None), whole)


def _package() -> Any:
    import bitsandbytes

    return bitsandbytes


def _check_installed() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("weights of bitsandbytes need its package: pip install 'multilora[bnb]'")


class BitsAndBytes:
    """See `Method`."""

    def read(self, config: dict[str, Any]) -> WeightFormats:
        known = ("load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")
        check_fields(config, (*known, "llm_int8_skip_modules", *HARMLESS))
        served(config, "load_in_8bit", (False,))
        served(config, "bnb_4bit_quant_storage", ("uint8",))
        kind = FourBit(
            served(config, "bnb_4bit_quant_type", ("fp4", "nf4")), bool(config.get("bnb_4bit_use_double_quant"))
        )
        _check_installed()
        skipped = skips(config.get("llm_int8_skip_modules"))
        return WeightFormats(kind.name, lambda path: PLAIN if skipped(path) else kind)

    def quantise(self) -> WeightFormats:
        """nf4 with double quantisation, as QLoRA."""
        _check_installed()
        kind = FourBit("nf4", nested=True)
        return WeightFormats(kind.name, lambda path: PLAIN if is_of_experts(path) else kind)


METHOD = BitsAndBytes()
