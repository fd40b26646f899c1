"""Weights in the model's own dtype, and which format each linear layer of a base model has: this one, unless said."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from multilora.batch import ExpertRows
from multilora.errors import ModelUnsupported
from multilora.layers.grouped_matmul import grouped_product, has_grouped_product
from multilora.layers.matmul import linear
from multilora.layers.weights.base import ExpertsFormat, ExpertsWeight, Share, Stored, Weight, WeightFormat
from multilora.lora.sites import LoraSite, module_path

NOISE = 0.02
"""Standard deviation of random weights."""


class PlainWeight(Weight):
    """W as one tensor of the model's dtype: fp32, bf16 or fp16."""

    def __init__(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        data = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.data = nn.Parameter(data, requires_grad=False)  # [out, in]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, self.data, bias)

    def dequantised(self, rows: slice) -> torch.Tensor:
        return self.data[rows]

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:  # noqa: ARG002 - the contract's
        shape = (share.out_features, share.in_features)
        return {"weight": Stored(shape, part=(share.outputs, share.inputs))}

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        assert name == "weight"
        self.data[rows].copy_(tensor)

    def randomise(self, generator: torch.Generator) -> None:
        self.data.normal_(std=NOISE, generator=generator)


class PlainExperts(PlainWeight, ExpertsWeight):
    """See `ExpertsWeight`."""

    def __init__(self, experts: int, height: int, in_features: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__(experts * height, in_features, device=device, dtype=dtype)
        self.experts, self.height, self.width = experts, height, in_features

    def grouped_matmul(self, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        return grouped_product(x, self.data.unflatten(0, (self.experts, self.height)), rows)

    @property
    def capturable(self) -> bool:
        return has_grouped_product(self.data.device, self.dtype, self.height, self.width)


class PlainFormat(ExpertsFormat):
    """Weights in the model's dtype."""

    shards = True

    @property
    def name(self) -> str:
        return "plain"

    def make(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype) -> Weight:
        from multilora.layers.weights.onednn import OneDnnWeight, reorders

        kind = OneDnnWeight if reorders(device, dtype) else PlainWeight
        return kind(out_features, in_features, device=device, dtype=dtype)

    def make_experts(
        self, experts: int, parts: Sequence[int], in_features: int, *, device: torch.device, dtype: torch.dtype
    ) -> ExpertsWeight:
        return PlainExperts(experts, sum(parts), in_features, device=device, dtype=dtype)


PLAIN = PlainFormat()


SERVED = "in 16 bit, fp8 and packed integers of 4 or 8 bit"
"""What experts of native mixtures can be in."""
EXPERT_MODULES = ("gate_proj", "up_proj", "down_proj")
"""The modules of an expert, as most checkpoints name them."""


@dataclass(frozen=True)
class WeightFormats:
    """In which format every linear layer of a base model is held.

    name: as logs say it. choose: from the path of a module, as checkpoints name it. choose_expert: the same of the
    modules of experts in native mixtures, if `choose` does not say it.
    """

    name: str = PLAIN.name
    choose: Callable[[str], WeightFormat] = lambda _path: PLAIN
    choose_expert: Callable[[str], WeightFormat] | None = None

    def of_site(self, site: LoraSite) -> tuple[WeightFormat, ...]:
        """The formats of the slices of a site of a family that has its modules where `LAYERS` says."""
        return tuple(self.choose(module_path(site.layer, s.parent, s.attribute or s.module)) for s in site.slices)

    def of_experts(self, path: str, count: int) -> ExpertsFormat:
        """The format of the `count` experts at this path of a native mixture. Raises ModelUnsupported if they have
        several, or one that experts cannot have."""
        choose = self.choose_expert or self.choose
        found = {choose(f"{path}.{number}.{module}"): None for number in range(count) for module in EXPERT_MODULES}
        if len(found) > 1:
            names = " and ".join(dict.fromkeys(kind.name for kind in found))
            raise ModelUnsupported(f"{path}: some experts in {names} are not supported; all in the same format are")
        (kind,) = found
        if not isinstance(kind, ExpertsFormat):
            raise ModelUnsupported(f"{path}: experts in {kind.name} are not supported; {SERVED} they are")
        return kind

    def check_experts(self, path: str) -> None:
        """Raise ModelUnsupported if a checkpoint holds the experts at this path, which are transformers' own modules,
        in another format than plain."""
        found = self.choose(f"{path}.0.up_proj")
        if found is not PLAIN:
            raise ModelUnsupported(
                f"{path}: experts in {found.name} are not supported through transformers' modules; in 16 bit they are"
            )


PLAIN_FORMATS = WeightFormats()
