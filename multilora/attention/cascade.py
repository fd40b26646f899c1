"""The attention of decodes of which some begin with the same pages, as a cascade (see `batch.SharedPages`).

Shared pages are read once for all that share them (`triton_cascade.py`), a request's own ones as ever
(`triton_decode.py`), and the partial results of both are merged. Called by `paged.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from multilora.attention.base import AttentionShape
from multilora.attention.triton_cascade import HEAD_WORDS, attend_shared, most_members
from multilora.attention.triton_decode import MIN_PIECE, PROGRAMS, budget, cut, decode
from multilora.batch import SharedPages
from multilora.kernels.integers import cdiv
from multilora.transfer import upload

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """A step's tables on the host. own, spans: see `triton_decode.cut`; shared: see `triton_cascade`; slots: how many
    partial results there are."""

    own: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    shared: npt.NDArray[np.int32]
    slots: int


def plan(
    pages: Ints, tokens: Ints, shared: Sequence[SharedPages], page_size: int, kv_heads: int, members: int
) -> Tables:
    """pages, tokens: of each decode, in the order of the page list; shared: by their numbers; members: see
    `most_members`."""
    rows, starts = len(pages), np.cumsum(pages) - pages
    common = np.zeros(rows, np.int64)  # shared pages of each
    for one in shared:
        common[list(one.requests)] = one.first + one.blocks  # longer ones come later
    rest = pages - common
    own = cut(rest, tokens - common * page_size, np.zeros_like(rest), page_size, budget(rows, kv_heads)).pieces
    own = own[own[:, 2] > 0]
    own[:, 1] += (starts + common - (np.cumsum(rest) - rest))[own[:, 0]]
    stretches = list(_stretches(shared, page_size, kv_heads, members))
    counts = np.bincount(own[:, 0], minlength=rows)
    for requests, _, _ in stretches:
        counts[list(requests)] += 1
    merged = counts > 1
    first = np.cumsum(counts * merged) - counts * merged  # a merged request's first slot
    own = own[np.lexsort((own[:, 1], own[:, 0]))]  # a request's pieces beside each other, in order
    place = np.arange(len(own)) - np.searchsorted(own[:, 0], own[:, 0])
    own[:, 4] = np.where(merged[own[:, 0]], first[own[:, 0]] + place, -1)
    taken = np.bincount(own[:, 0], minlength=rows)
    table = np.zeros((len(stretches), HEAD_WORDS + 2 * members), np.int32)
    for entry, (requests, block, blocks) in zip(table, stretches, strict=True):
        who = np.array(requests)
        entry[:3] = starts[who[0]] + block, blocks * page_size, len(who)
        entry[HEAD_WORDS : HEAD_WORDS + len(who)] = who
        entry[HEAD_WORDS + members : HEAD_WORDS + members + len(who)] = first[who] + taken[who]
        taken[who] += 1
    split = np.flatnonzero(merged)
    spans = np.stack((split, first[split], counts[split]), axis=1).astype(np.int32)
    longest = np.argsort(-own[:, 2], kind="stable")
    return Tables(own[longest], spans, table, int((counts * merged).sum()))


def _stretches(
    shared: Sequence[SharedPages], page_size: int, kv_heads: int, members: int
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Requests, first page and pages of each piece, of about equal length, and about as many as fill the GPU."""
    programs = max(1, PROGRAMS // kv_heads)
    work = sum(cdiv(len(one.requests), members) * one.blocks for one in shared)
    each = max(cdiv(MIN_PIECE, page_size), cdiv(work, programs))
    for one in shared:
        parts = cdiv(one.blocks, each)
        length = cdiv(one.blocks, parts)
        for at in range(0, len(one.requests), members):
            for block in range(0, one.blocks, length):
                yield one.requests[at : at + members], one.first + block, min(length, one.blocks - block)


@dataclass(frozen=True)
class CascadeStep:
    """The decodes of a step of which some share pages. tables: own, spans and shared of `Tables`, on the device;
    indices: the page lists of all decodes; scratch: for partial results."""

    shape: AttentionShape
    tables: tuple[torch.Tensor, ...]
    indices: torch.Tensor
    scratch: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def make(
        cls,
        shape: AttentionShape,
        page_size: int,
        requests: npt.NDArray[np.int32],
        shared: Sequence[SharedPages],
        indices: torch.Tensor,
    ) -> "CascadeStep":
        """requests: the decodes as `list_pages` takes them; shared: by their numbers."""
        pages, last = requests[3].astype(np.int64), requests[4]
        tokens = (pages - 1) * page_size + last + 1
        members = most_members(shape.num_heads // shape.num_kv_heads)
        tables = plan(pages, tokens, shared, page_size, shape.num_kv_heads, members)
        size = tables.slots, shape.num_heads, shape.head_dim
        partial = torch.empty(size, dtype=torch.float32, device=indices.device)
        return cls(
            shape, _on_device(tables, indices.device), indices, (partial, partial.new_empty(partial.shape[:2]))
        )

    def run(
        self,
        q: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        layer: int,
        sinks: torch.Tensor | None,
    ) -> None:
        """q, out: [decodes, heads, head_dim]; kv: the layer's pages."""
        own, spans, shared = self.tables
        k_scale, v_scale = self.shape.scales_of(layer)
        scale, softcap = self.shape.scale * k_scale, self.shape.softcap
        attend_shared(q, kv, self.indices, shared, *self.scratch, scale, v_scale, softcap=softcap)
        decode(q, kv, self.indices, own, spans, *self.scratch, out, scale, v_scale, softcap=softcap, sinks=sinks)


def _on_device(tables: Tables, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Own, spans and shared in one copy, each at a multiple of 16 bytes, for which kernels are compiled."""
    parts = tables.own, tables.spans, tables.shared
    starts = np.cumsum([0, *(cdiv(part.size, 4) * 4 for part in parts)]).tolist()
    words = np.zeros(starts[-1], np.int32)
    for start, part in zip(starts, parts, strict=False):
        words[start : start + part.size] = part.ravel()
    on_device = upload(torch.from_numpy(words), device)
    return tuple(
        on_device[start : start + part.size].view(part.shape) for start, part in zip(starts, parts, strict=False)
    )
