"""The last stage of packing, which needs facts of the base model's weights: DoRA's norms and trained biases.

The packer leaves a scale-shift pair as magnitude m and bias. This file turns it into what the kernels apply to the
base model's output y = W x + b after the low-rank part (the pages hold s · B and A):

    scale = m / ‖W + s · BA‖, one norm per output (Liu et al. 2024, arXiv:2402.09353); 1 without DoRA
    shift = trained bias (or b) + bias of lora_B - scale · b

Ranks that share the model have a pair each. A rank that holds some inputs of a module knows the norms of its columns
only: the squares of the ranks' norms are summed. b is what the rank itself adds: only one of them has a shift there.

`DoraBiasLoader` wraps any loader. It works for a few milliseconds at a time, between two steps, on its own stream.
Called by `engine/build.py`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import monotonic

import torch

from multilora.adapters.loading.loader import Fetched, FetchJob, Loader
from multilora.adapters.packing.blocks import PackTarget, part_view, scale_shift_view
from multilora.lora.panels import RANK_GRANULE, PanelLayout, PanelPart, ScaleShift
from multilora.lora.sharding import sums_over_ranks

SLICE_SECONDS = 0.002

BaseModule = Callable[[int, str], tuple[torch.Tensor, torch.Tensor | None]]
"""(layer, module) → the base model's weight [out, in] and bias [out]."""

Delta = tuple[torch.Tensor, torch.Tensor]
"""A [rank, in] and s · B [rank, out] of a module, fp32."""

Facts = Callable[[int, str, Sequence[Delta | None]], Sequence[torch.Tensor]]
"""(layer, module, each rank's delta) → for each rank, `module_facts`."""


def module_facts(base: BaseModule, layer: int, module: str, delta: Delta | None) -> torch.Tensor:
    """fp32 [2, out] on the host: the norms of the rows of W + s · BA (zeros without a delta), and b (or zeros)."""
    weight, bias = base(layer, module)
    facts = torch.zeros(2, len(weight), device=weight.device)
    if delta is not None:
        a, b = (factor.to(weight.device) for factor in delta)
        facts[0] = torch.addmm(weight.float(), b.T, a).norm(dim=1)
    if bias is not None:
        facts[1] = bias.float()
    return facts.cpu()


def facts_of_one(base: BaseModule) -> Facts:
    """The facts where one rank holds the whole model."""
    return lambda layer, module, deltas: [module_facts(base, layer, module, deltas[0])]


@dataclass
class _Work:
    """An adapter that is being completed, one pair per step of `steps`."""

    result: Fetched
    buffer: torch.Tensor
    steps: Iterator[None]


class DoraBiasLoader:
    """The contract of `Loader`: it completes what the wrapped loader returns.

    has_base: whether the base model's weights can be read now, else what needs them waits. seconds: the time for one
    `poll`.
    """

    def __init__(
        self,
        loader: Loader,
        target: PackTarget,
        facts: Facts,
        has_base: Callable[[], bool] = lambda: True,
        seconds: float = SLICE_SECONDS,
    ):
        self._loader = loader
        self._target = target
        self._facts = facts
        self._has_base = has_base
        self._seconds = seconds
        self._queue: deque[_Work] = deque()
        self._stream: torch.cuda.Stream | None = None

    @property
    def working(self) -> bool:
        """See `Loader`."""
        return (bool(self._queue) and self._has_base()) or self._loader.working

    def submit(self, job: FetchJob) -> None:
        """See `Loader`."""
        self._loader.submit(job)

    def poll(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        """See `Loader`. Adapters without scale-shift pairs pass at once."""
        done = []
        for result, buffer in self._loader.poll():
            if buffer is None or result.shape is None or not result.shape.scale_shift:
                done.append((result, buffer))
            else:
                layout = self._target.layout(result.shape)
                steps = complete_scale_shifts(buffer, layout, self._target, self._facts)
                self._queue.append(_Work(result, buffer, steps))
        return done + self._work()

    def fileno(self) -> int | None:
        """See `Loader`."""
        return self._loader.fileno()

    def close(self) -> None:
        """See `Loader`."""
        self._queue.clear()
        self._loader.close()

    def _work(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        done: list[tuple[Fetched, torch.Tensor | None]] = []
        deadline = monotonic() + self._seconds
        with torch.inference_mode(), self._side_stream():
            while self._queue and self._has_base() and monotonic() < deadline:
                if next(self._queue[0].steps, StopIteration) is StopIteration:
                    work = self._queue.popleft()
                    done.append((work.result, work.buffer))
        return done

    def _side_stream(self) -> AbstractContextManager[object]:
        """A stream of its own: the base model's weights never change, so nothing has to wait for the running step."""
        if not self._queue or not torch.cuda.is_available():
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return torch.cuda.stream(self._stream)


def complete_scale_shifts(
    buffer: torch.Tensor, layout: PanelLayout, target: PackTarget, facts: Facts
) -> Iterator[None]:
    """Complete every scale-shift pair of `buffer`, uint8 [ranks · pages, page_bytes], in place; yields after each one
    of all ranks."""
    ranks = buffer.split(layout.num_pages)
    a: tuple[PanelPart, ...] = ()
    b: dict[int, tuple[int, int, tuple[PanelPart, ...]]] = {}  # slice → first row in A, rank, parts of B
    for matrix, parts in zip(layout.matrices, layout.parts, strict=True):
        site = target.sites[matrix.site]
        if matrix.slice < 0:
            a, b = parts, {}
        elif not matrix.scale_shift:
            b[matrix.slice] = sum(rank for _, rank, _ in b.values()), matrix.rank, parts
        else:
            kind = ScaleShift(layout.shape.scale_shift[matrix.site][matrix.slice])
            deltas: list[Delta | None] = [None] * len(ranks)
            if kind & ScaleShift.DORA:
                assert matrix.slice in b, "a magnitude without low rank"
                first, rank, b_parts = b[matrix.slice]
                deltas = [
                    (
                        _read(pages, target, a, first, rank, site.in_features),
                        _read(pages, target, b_parts, 0, rank, matrix.width),
                    )
                    for pages in ranks
                ]
            found = torch.stack(list(facts(site.layer, site.slices[matrix.slice].module, deltas)))
            norms, biases = found[:, 0], found[:, 1]  # [ranks, out]
            if sums_over_ranks(site) and len(ranks) > 1:
                norms = norms.norm(dim=0).expand_as(norms)
            for pages, norm, bias in zip(ranks, norms, biases, strict=True):
                _complete(pages, parts, kind, norm, bias)
            yield


def _complete(
    pages: torch.Tensor, parts: tuple[PanelPart, ...], kind: ScaleShift, norm: torch.Tensor, bias: torch.Tensor
) -> None:
    """Complete one pair of one rank. norm, bias: [out]."""
    pair = torch.cat([scale_shift_view(pages, part) for part in parts], dim=1)
    if kind & ScaleShift.DORA:
        pair[0] /= norm
    kept = torch.zeros_like(bias) if kind & ScaleShift.BIAS else bias
    pair[1] += kept - pair[0] * bias
    for part in parts:
        scale_shift_view(pages, part).copy_(pair[:, part.col : part.col + part.columns])


def _read(
    buffer: torch.Tensor, target: PackTarget, parts: tuple[PanelPart, ...], first: int, rank: int, width: int
) -> torch.Tensor:
    """Rows [first, first + rank) of a packed matrix, fp32 [rank, width]."""
    found = torch.zeros(rank, width)
    for part in parts:
        row = part.row - first
        if 0 <= row < rank:
            found[row : row + RANK_GRANULE, part.col : part.col + part.columns] = part_view(
                buffer, target, part, RANK_GRANULE
            )
    return found
