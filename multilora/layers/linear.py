"""The linear layer of every model, one matrix even where PEFT sees several (q, k and v; gate and up).

This is the only place where LoRA enters. The layer knows its site; which adapters act there is known to the backend,
which has been prepared for this step. Gate and up come out activated, since a backend may add LoRA on the way through
the activation.

A rank of a group holds its part of the matrix (`lora/sharding.py`). Where that is a part of the inputs, its outputs
are a share, LoRA's included, which the norm behind it sums over the ranks: what is added once, a bias, rank 0 adds.
"""

from collections.abc import Sequence

import torch
from torch import nn

from multilora.distributed.group import SINGLE, Group
from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.activation import SiluAndMul
from multilora.layers.context import ForwardContext
from multilora.layers.weights.base import Share, Stored, Weight, WeightFormat
from multilora.layers.weights.joined import make_weight
from multilora.layers.weights.plain import PLAIN
from multilora.lora.full_weights import FullWeightModules, product
from multilora.lora.sharding import inputs_of, local_site, outputs_of, sums_over_ranks
from multilora.lora.sites import LoraSite, LoraSlice


class Linear(nn.Module):
    """y = x Wᵀ + b, then the step's adapters in place. Widths and the presence of a bias come from the site.

    whole: the site as declared; site: what this rank holds of it, which widths below are those of; is_share: whether
    the outputs are this rank's share of a sum. formats: of the weights of its slices; empty: they are of `dtype`.
    """

    def __init__(
        self,
        whole: LoraSite,
        *,
        device: torch.device,
        dtype: torch.dtype,
        group: Group = SINGLE,
        formats: Sequence[WeightFormat] = (),
    ):
        super().__init__()
        formats = formats or (PLAIN,) * len(whole.slices)
        _check_formats(whole, formats, group)
        if group.size > 1:
            formats = [found.of_ranks() for found in formats]
        self.whole = whole
        self.site = site = local_site(whole, group.size)
        self.group = group
        self.is_share = group.size > 1 and sums_over_ranks(whole)
        widths = [s.out_features for s in site.slices]
        self.weight: Weight = make_weight(formats, widths, site.in_features, device=device, dtype=dtype)
        self.bias: nn.Parameter | None = None
        if site.bias:
            self.bias = nn.Parameter(torch.empty(site.out_features, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, in_features], contiguous. Returns [tokens, out_features], a share of them where `is_share`."""
        y = self._product(x, ctx)
        if ctx.lora is not None:
            ctx.lora.apply(y, x, self.site.index)
        return y

    @property
    def added_bias(self) -> nn.Parameter | None:
        """The bias that this rank adds."""
        return None if self.is_share and self.group.rank else self.bias

    def _product(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """What LoRA is added to."""
        if ctx.lora is not None:
            ctx.lora.begin()
        y = self.weight.matmul(x, self.added_bias)
        if ctx.full_weights is not None:
            self._replace(y, x, ctx.full_weights)
        return y

    def _replace(self, y: torch.Tensor, x: torch.Tensor, full_weights: FullWeightModules) -> None:
        """Write the outputs of adapters that bring a module's whole weight. (A trained bias comes later, as a shift.)

        y: [tokens, out_features], changed in place.
        """
        bias = self.added_bias
        for s in self.site.slices:
            for rows, weights in full_weights.find(self.site.layer, s.module):
                y[rows, s.columns] = product(x[rows], weights)
                if bias is not None:
                    y[rows, s.columns] += bias[s.columns]

    def base_weight(self, part: LoraSlice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [out, in], dequantised, and added bias [out] of one of the site's slices; read-only."""
        bias = self.added_bias[part.columns] if self.added_bias is not None else None
        return self.weight.dequantised(part.columns), bias

    def tensors(self, part: LoraSlice) -> dict[str, Stored]:
        """Which tensors of a checkpoint fill one of the site's slices, by their names in its module; a transposed
        slice's weight comes as [in, out]."""
        rank, size = self.group.rank, self.group.size
        (entire,) = (s for s in self.whole.slices if s.module == part.module)
        outputs, inputs = outputs_of(self.whole, entire, rank, size), inputs_of(self.whole, rank, size)
        share = Share(entire.out_features, self.whole.in_features, outputs, inputs)
        found = self.weight.tensors(part.columns, share)
        if part.transposed:
            found["weight"] = Stored((self.whole.in_features, entire.out_features), part=(inputs, outputs))
        if part.bias:
            found["bias"] = Stored((entire.out_features,), part=(outputs,))
        return found

    def load(self, part: LoraSlice, name: str, tensor: torch.Tensor) -> None:
        """Fill one of the site's slices from one of its `tensors`."""
        if name == "bias" and self.bias is not None:
            self.bias[part.columns].copy_(tensor)
        else:
            self.weight.load(part.columns, name, tensor.T if part.transposed else tensor)


class GateUp(Linear):
    """silu(gate) · up, where [gate, up] = x Wᵀ + b, then the step's adapters."""

    def __init__(
        self,
        whole: LoraSite,
        *,
        device: torch.device,
        dtype: torch.dtype,
        group: Group = SINGLE,
        formats: Sequence[WeightFormat] = (),
    ):
        super().__init__(whole, device=device, dtype=dtype, group=group, formats=formats)
        self.silu_and_mul = SiluAndMul()

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, in_features], contiguous. Returns [tokens, out_features / 2]."""
        y = self._product(x, ctx)
        if ctx.lora is None:
            activated: torch.Tensor = self.silu_and_mul(y)
            return activated
        return ctx.lora.apply_gated(y, x, self.site.index, self.silu_and_mul)


def _check_formats(whole: LoraSite, formats: Sequence[WeightFormat], group: Group) -> None:
    """Raise ModelUnsupported for a slice that a format has no weight for, ConfigError for ranks."""
    for part, found in zip(whole.slices, formats, strict=True):
        if part.transposed and found is not PLAIN:
            raise ModelUnsupported(f"{part.module} is held as [in, out], which weights in {found.name} cannot be")
        if group.size > 1 and not found.shards:
            raise ConfigError(
                f"--tp-size {group.size}: ranks do not divide weights in {found.name}; --tp-size 1 serves the model"
            )
        if group.size > 1 and sums_over_ranks(whole) and found.unshared_inputs:
            raise ConfigError(
                f"--tp-size {group.size}: ranks do not divide the inputs of {part.module} in {found.name}: "
                f"{found.unshared_inputs}; --tp-size 1 serves the model"
            )
