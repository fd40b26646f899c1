"""Checkpoints of packed integers, written and read by NumPy bit by bit: what the package's own unpacking is held
against. Every `pack_…` takes integers, zero points and scales as the layouts' documentation has them."""

from dataclasses import dataclass

import numpy as np
import torch

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Integers:
    """W[o, i] = (numbers[o, i] - zeros[o, g]) · scales[o, g], where g = group[i]; all in unsigned numbers."""

    numbers: np.ndarray  # [out, in]
    zeros: np.ndarray  # [out, groups]
    scales: torch.Tensor  # fp16 [out, groups]
    group: np.ndarray  # [in]

    @property
    def weight(self) -> torch.Tensor:
        difference = torch.from_numpy((self.numbers - self.zeros[:, self.group]).astype(np.float32))
        return difference * self.scales.float()[:, torch.from_numpy(self.group)]


def rounded(
    weight: torch.Tensor, bits: int, size: int, *, symmetric: bool, order: np.ndarray | None = None
) -> Integers:
    """order: the inputs, group after group; None: as they are."""
    width = weight.shape[1]
    order = np.arange(width) if order is None else order
    group = np.empty(width, dtype=np.int64)
    group[order] = np.arange(width) // size
    most = (1 << bits) - 1
    low = torch.stack([weight[:, group == g].amin(1).clamp(max=0) for g in range(group.max() + 1)], 1)
    high = torch.stack([weight[:, group == g].amax(1).clamp(min=0) for g in range(group.max() + 1)], 1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / most).half()
    zeros = (most + 1) // 2 * torch.ones_like(scales) if symmetric else (-low / scales.float()).round()
    wide = scales.float()[:, group], zeros.float()[:, group]
    numbers = (weight / wide[0] + wide[1]).round().clamp(0, most)
    return Integers(numbers.int().numpy(), zeros.clamp(0, most).int().numpy(), scales, group)


def _words(columns: np.ndarray, bits: int) -> torch.Tensor:
    """columns: [rows, n], the lowest bits of a word first."""
    per_word = 32 // bits
    found = np.zeros((columns.shape[0], -(-columns.shape[1] // per_word)), dtype=np.uint32)
    for i in range(columns.shape[1]):
        found[:, i // per_word] |= columns[:, i].astype(np.uint32) << np.uint32(bits * (i % per_word))
    return torch.from_numpy(found.view(np.int32))


def pack_gptq(ints: Integers, bits: int, older: bool = True) -> dict[str, torch.Tensor]:
    """older: zero points are stored less one, and wrap."""
    stored = (ints.zeros - int(older)) & ((1 << bits) - 1)
    return {
        "qweight": _words(ints.numbers, bits).T,
        "qzeros": _words(stored.T, bits),
        "scales": ints.scales.T,
        "g_idx": torch.from_numpy(ints.group).int(),
    }


def pack_awq(ints: Integers) -> dict[str, torch.Tensor]:
    def interleaved(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(rows.shape[0], -1, 8)[:, :, AWQ_ORDER].reshape(rows.shape)

    return {
        "qweight": _words(interleaved(ints.numbers.T), 4),
        "qzeros": _words(interleaved(ints.zeros.T), 4),
        "scales": ints.scales.T,
    }


def pack_compressed(ints: Integers, bits: int, *, symmetric: bool, in_order: bool) -> dict[str, torch.Tensor]:
    found = {
        "weight_packed": _words(ints.numbers, bits),
        "weight_scale": ints.scales,
        "weight_shape": torch.tensor(ints.numbers.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = _words(ints.zeros.T, bits).T
    if not in_order:
        found["weight_g_idx"] = torch.from_numpy(ints.group).int()
    return found
