"""The scales of keys and values that a checkpoint brings for a KV cache of 8-bit floats."""

from collections.abc import Sequence
from functools import partial

import torch

from multilora.errors import ModelUnsupported
from multilora.models.weights import Destination

NAMES = ("{kind}_scale", "attn.{kind}_scale", "{kind}_proj.{kind}_scale", "{kind}_proj.output_scale")
"""What they are called, inside a layer's attention, by the tools that write them. kind: k or v."""


class KVScales:
    """One for keys and one for values of each layer; 1 until a checkpoint says otherwise."""

    def __init__(self, paths: Sequence[str]):
        """paths: of the layers' attention, in checkpoints."""
        self._paths = paths
        self._keys, self._values = [1.0] * len(paths), [1.0] * len(paths)

    @property
    def by_layer(self) -> tuple[tuple[float, float], ...]:
        return tuple(zip(self._keys, self._values, strict=True))

    def destinations(self) -> dict[str, Destination]:
        """Where the checkpoint's tensors go; it need not have any."""
        found = {}
        for layer, path in enumerate(self._paths):
            for kind, scales in (("k", self._keys), ("v", self._values)):
                for pattern in NAMES:
                    name = f"{path}.{pattern.format(kind=kind)}"
                    found[name] = Destination(None, partial(_put, scales, layer, name), optional=True)
        return found

    def __str__(self) -> str:
        given = any(scale != 1.0 for scale in (*self._keys, *self._values))
        return "with the checkpoint's scales" if given else "without scales"


def _put(scales: list[float], layer: int, name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() != 1 or not 0 < float(tensor) < float("inf"):
        raise ModelUnsupported(f"{name} has shape {list(tensor.shape)} or no value above zero: one scale is served")
    scales[layer] = float(tensor)
