"""Modules that adapters replace entirely, and what adapters add to token embeddings, for one step.

PEFT's `modules_to_save`, trained token rows and LoRA on `embed_tokens` act outside the linear layers' low-rank pass.
They are rare, so they are served exactly and plainly: row range by row range, in torch operations, never inside a
CUDA graph (embedding and head lie outside). Called by `engine/execution/runner.py`, which makes one object for each
step that needs it; the layers ask that object.
"""

from collections.abc import Iterator

import torch

from multilora.batch import LoraSegment
from multilora.lora.table import FullWeight, LoraTable, SiteWeights
from multilora.lora.torch_backend import expand


class FullWeightModules:
    """What the adapters in a step's segments replace or add to embeddings. Such adapters are never composed."""

    def __init__(self, table: LoraTable, segments: tuple[LoraSegment, ...], embed_site: int):
        self._table = table
        self._segments = segments
        self._embed_site = embed_site

    def find(self, layer: int, module: str) -> Iterator[tuple[slice, FullWeight]]:
        """Rows of the step, and the weight that stands in for the base model's `module` of `layer` there."""
        for segment in self._segments:
            for slot in segment.slots:
                for weights in self._table.full_weights(slot, layer, module):
                    yield slice(segment.start, segment.end), weights

    def embed(
        self, y: torch.Tensor, ids: torch.Tensor, layer: int, module: str, *, first: int = 0, replaces: bool = True
    ) -> None:
        """Replace trained rows and add the low rank, in place. y: [tokens, hidden], the base model's rows for
        `ids`, int64 [tokens].

        For a rank whose rows are one share of a sum: first: the token of the first column of its A; replaces: False
        where another rank adds the trained rows, then the base model's become zero.
        """
        for rows, weights in self.find(layer, module):
            replace_rows(y[rows], ids[rows], weights, 1 if replaces else 0)
        for segment in self._segments:
            rows = slice(segment.start, segment.end)
            for slot, weight in zip(segment.slots, segment.weights, strict=True):
                low_rank = self._table.site(slot, self._embed_site)
                if low_rank is not None:
                    expand(y[rows], columns_of(low_rank, ids[rows] - first), low_rank, weight)


def product(x: torch.Tensor, weights: FullWeight) -> torch.Tensor:
    """x: [rows, cols] → x Wᵀ, [rows, weights.rows]."""
    return torch.cat([x @ piece.weight.to(x.dtype).T for piece in weights.pieces], dim=1)


def replace_rows(y: torch.Tensor, ids: torch.Tensor, weights: FullWeight, factor: int = 1) -> None:
    """In place: row t of y, [tokens, cols], becomes `factor` times the weight's row for ids[t], where it has one."""
    index = ids
    if weights.token_ids is not None:
        index = torch.searchsorted(weights.token_ids, ids).clamp_(max=weights.rows - 1)
        known = weights.token_ids[index] == ids
    else:
        known = torch.ones_like(ids, dtype=torch.bool)
    for piece in weights.pieces:
        count = len(piece.weight)
        inside = known & (index >= piece.row) & (index < piece.row + count)
        row = piece.weight[(index - piece.row).clamp_(0, count - 1)]
        torch.where(inside[:, None], row.to(y.dtype) * factor, y, out=y)


def columns_of(weights: SiteWeights, ids: torch.Tensor) -> torch.Tensor:
    """x Aᵀ for one-hot x: column ids[t] of the stacked A, [tokens, rank]."""
    weight = weights.a[0].weight
    h = weight.new_zeros(len(ids), weights.rank)
    for piece in weights.a:
        rows, columns = piece.weight.shape
        inside = (ids >= piece.col) & (ids < piece.col + columns)
        found = piece.weight[:, (ids - piece.col).clamp_(0, columns - 1)].T
        h[:, piece.row : piece.row + rows] += torch.where(inside[:, None], found, 0)
    return h
