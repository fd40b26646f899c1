"""Steps as CUDA graphs, by padded number of rows, with and without LoRA: `prepare` gives one to launch, or None.

A graph holds decoder layers, from embedded rows to hidden ones. What varies from step to step lies in buffers that
stay where they are: rows and positions here, page tables in the attention backend's twin, adapters in the LoRA
backend's tables. So no adapter, rank or mix ever needs a new capture. Embedding and head come before and after, as in
any step: what an adapter does to them does not concern a graph.

Decodes, where every request has one new token, are one graph. Steps with prompts are cut where each layer attends: a
prompt of a hundred tokens takes a GPU a few milliseconds and the host, launch by launch, three times as long.
Attention depends on lengths and is launched as ever; what lies between two of them (the end of one layer, the
beginning of the next) depends on nothing but the number of rows and is one graph each.

    graph 0                  | attend 0 | graph 1                               | attend 1 |  …  | graph L
    norm, q k v, rotate                   o, norm, MLP; norm, q k v, rotate                        …, final norm

The model knows nothing of it: while it is captured, its attention ends one graph and begins the next. Padding rows at
the end of a step compute something that nobody reads.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from multilora.attention.base import GraphAttention, LayerAttention, PieceAttention
from multilora.attention.rotate import CosSin
from multilora.batch import AttentionMeta, ColumnPages, ForwardBatch, LoraSegment
from multilora.kernels.integers import cdiv
from multilora.layers.context import ForwardContext
from multilora.lora.base import LoraBackend
from multilora.models.base import CausalLM

logger = logging.getLogger(__name__)

MOST_PIECE_ROWS = 2048
"""Prompt tokens of a step up to which steps with prompts are captured, unless --piecewise-cuda-graph-max-tokens says
otherwise. A GPU takes longer for a larger one than the host takes to launch it."""


def piece_sizes(tokens: int, decodes: int) -> list[int]:
    """Rows of steps with prompts, of up to `tokens` prompt tokens beside up to `decodes` decodes: all multiples of
    32, from 256 on of 64, from 512 on of 128, from 1,024 on of 256, and what full prompts have with none, with 64 and
    with all decodes; none without tokens."""
    if not tokens:
        return []
    most = tokens + cdiv(decodes, 32) * 32
    sizes = (*range(32, 256, 32), *range(256, 512, 64), *range(512, 1024, 128), *range(1024, most, 256))
    return sorted({size for size in (*sizes, tokens, tokens + 64, most) if size <= most})


MOST_DECODES = 512
"""Rows of decodes up to which they are captured, unless --cuda-graph-max-bs says otherwise."""


def decode_sizes(largest: int) -> list[int]:
    """1, 2, 4, then the multiples of 8, from 256 on of 32, and `largest` itself."""
    sizes = 1, 2, 4, *range(8, min(largest, 256), 8), *range(256, largest, 32), largest
    return sorted({s for s in sizes if s <= largest})


class GraphedStep(Protocol):
    """The layers of one step, ready to be launched."""

    def run(self, x: Tensor) -> Tensor:
        """x: the step's rows, embedded, [rows, hidden]. Returns their hidden rows, valid until the next run."""
        ...


class StepGraphs(Protocol):
    """What a runner asks."""

    def prepare(self, batch: ForwardBatch, *, decodes: bool) -> GraphedStep | None:
        """decodes: every request has one new token. None: no graph serves such a step; launch its layers one by one.

        A step that is prepared is run before the next one is prepared.
        """
        ...


class _Recorder:
    """Graphs of one forward pass, each captured from a cut to the next. pool: memory that all of them share."""

    def __init__(self, pool: Any):
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._pool = pool

    def __enter__(self) -> "_Recorder":
        self._begin()
        return self

    def __exit__(self, *exc: object) -> None:
        self.graphs[-1].capture_end()

    def cut(self) -> None:
        self.graphs[-1].capture_end()
        self._begin()

    def _begin(self) -> None:
        self.graphs.append(torch.cuda.CUDAGraph())
        self.graphs[-1].capture_begin(pool=self._pool)


class _Cut:
    """Stands where a layer's attention stands, during a capture in pieces."""

    def __init__(self, attention: PieceAttention, cut: Callable[[], None], copies: bool):
        """copies: the next call of attention may come before the result of this one is used."""
        self._attention = attention
        self._cut = cut
        self._copies = copies

    def forward(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: CosSin, sinks: Tensor | None = None
    ) -> Tensor:
        self._attention.rotate(layer, q, k, v, rope, sinks)
        self._cut()
        return self._attention.out.clone() if self._copies else self._attention.out


class _Decodes:
    """How decodes of one size are captured and attend: all of it is in the graph."""

    def __init__(self, twin: GraphAttention, device: torch.device):
        self._twin = twin
        self._device = device

    def prepare_capture(self) -> None:
        """For one request with one token, in page 0. Outside of the capture: it copies from the host."""
        zero = torch.zeros(1, dtype=torch.int64, device=self._device)
        further = (ColumnPages(zero[None], zero),) * (self._twin.columns - 1)
        self._twin.prepare(AttentionMeta((1,), (1,), zero[None], zero, zero, further))

    def layers(self, cut: Callable[[], None]) -> LayerAttention:
        del cut  # in one piece
        return self._twin

    def prepare(self, meta: AttentionMeta) -> None:
        self._twin.prepare(meta)

    def attend(self, layer: int) -> None:  # noqa: ARG002 - part of the contract
        raise AssertionError("a decode graph attends by itself")


class _Pieces:
    """How steps of one size are captured and attend when they are cut at each layer's attention."""

    def __init__(self, attention: PieceAttention, copies: bool):
        """copies: see `_Cut`."""
        self._attention = attention
        self._copies = copies
        self.prepare = attention.prepare
        self.attend = attention.attend

    def prepare_capture(self) -> None:
        """Nothing: what is captured does not depend on lengths and pages."""

    def layers(self, cut: Callable[[], None]) -> LayerAttention:
        return _Cut(self._attention, cut, self._copies)


@dataclass(frozen=True)
class _Captured:
    """Graphs of the layers: one, or one more than there are layers. rows, positions: what they read."""

    rows: Tensor  # [size, hidden]
    positions: Tensor  # int64 [size]
    attention: _Decodes | _Pieces
    graphs: list[torch.cuda.CUDAGraph]
    hidden: Tensor  # [size, hidden]


@dataclass(frozen=True)
class _Replay:
    captured: _Captured
    batch: ForwardBatch

    def run(self, x: Tensor) -> Tensor:
        captured, count = self.captured, len(x)
        captured.rows[:count] = x
        captured.positions[:count] = self.batch.positions
        captured.attention.prepare(self.batch.attention)
        *before, last = captured.graphs
        for layer, graph in enumerate(before):
            graph.replay()
            captured.attention.attend(layer)
        last.replay()
        return captured.hidden[:count]


class _GraphSet:
    """All sizes of one kind. attention: by number of rows; lora: None when LoRA is off."""

    def __init__(
        self,
        what: str,
        model: CausalLM,
        attention: Mapping[int, _Decodes] | Mapping[int, _Pieces],
        lora: LoraBackend | None,
        device: torch.device,
        *,
        decodes: bool,
    ):
        self._what = what
        self._decodes = decodes
        self._model = model
        self._attention = attention
        self._lora = lora
        self._device = device
        most, width = max(attention), model.config.hidden_size
        self._rows = torch.zeros(most, width, dtype=model.config.dtype, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._captured: dict[tuple[int, bool], _Captured] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Record everything, largest first so that the smaller ones reuse its memory. Nothing else may run."""
        started = monotonic()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))  # buffers are being filled there
        work = [(size, lora) for size in sorted(self._attention, reverse=True) for lora in (False, True)]
        with torch.cuda.stream(stream):
            for size, lora in tqdm(work, desc=f"Capturing {self._what}", unit="graph"):
                if not lora or self._prepare_lora((), size):
                    self._captured[size, lora] = self._capture(size, lora, pool)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.empty_cache()  # what was computed before the captures
        logger.info("captured %d sizes of %s in %.1f s", len(self._captured), self._what, monotonic() - started)

    def _capture(self, size: int, lora: bool, pool: Any) -> _Captured:
        attention, backend = self._attention[size], self._lora if lora else None
        rows, positions = self._rows[:size], self._positions[:size]

        def forward(cut: Callable[[], None]) -> Tensor:
            hidden: Tensor = self._model(rows, positions, ForwardContext(attention.layers(cut), backend))
            return hidden

        attention.prepare_capture()
        forward(lambda: None)  # compiles and allocates outside the graphs
        torch.cuda.synchronize(self._device)
        with _Recorder(pool) as recorder:
            hidden = forward(recorder.cut)
        return _Captured(rows, positions, attention, recorder.graphs, hidden)

    def prepare(self, batch: ForwardBatch) -> _Replay | None:
        """None if the step is too large or its adapters do not fit."""
        count = len(batch.positions)
        size = min((s for s in self._attention if s >= count), default=None)
        if size is None or (batch.lora and not self._prepare_lora(batch.lora, size)):
            return None
        return _Replay(self._captured[size, bool(batch.lora)], batch)

    def _prepare_lora(self, segments: tuple[LoraSegment, ...], size: int) -> bool:
        """Put the segments where the graphs look for them. False if they cannot."""
        if self._lora is None:
            return False
        self._lora.prepare(segments, size, captured=True, decodes=self._decodes)
        return self._lora.replayable


class CudaGraphs:
    """All captured graphs of one engine.

    decodes, pieces: by number of rows, the attention backend's `for_graph(size)` and `for_pieces(size)`.
    """

    def __init__(
        self,
        model: CausalLM,
        decodes: Mapping[int, GraphAttention],
        pieces: Mapping[int, PieceAttention],
        lora: LoraBackend | None,
        device: torch.device,
    ):
        twins = {size: _Decodes(twin, device) for size, twin in decodes.items()}
        halves = {size: _Pieces(half, copies=not model.attends_one_by_one) for size, half in pieces.items()}
        self._decodes = _GraphSet("decodes", model, twins, lora, device, decodes=True)
        self._pieces: _GraphSet | None = None
        if halves:
            self._pieces = _GraphSet("steps with prompts", model, halves, lora, device, decodes=False)

    def capture(self) -> None:
        """Nothing else may run, and page 0 is written."""
        self._decodes.capture()
        if self._pieces is not None:
            self._pieces.capture()

    def prepare(self, batch: ForwardBatch, *, decodes: bool) -> GraphedStep | None:
        """Decodes that share pages are cut where layers attend, as who shares what changes what is launched there.
        Where no graph is cut for such a step, each of them reads all of its pages."""
        found = None
        if self._pieces is not None and (batch.attention.shared or not decodes):
            found = self._pieces.prepare(batch)
        return self._decodes.prepare(batch) if found is None and decodes else found
