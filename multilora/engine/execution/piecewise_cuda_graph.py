"""Small steps with prompts in them as CUDA graphs, cut where each layer attends.

A prompt of a hundred tokens takes a GPU a few milliseconds and the host, launch by launch, three times as long; and
streams that run sit through it. Attention depends on lengths and is launched as ever; what lies between two of them
(the end of one layer, the beginning of the next) depends on nothing but the number of rows: one graph each.

    graph 0                  | attend 0 | graph 1                               | attend 1 |  …  | graph L
    norm, q k v, rotate                   o, norm, MLP; norm, q k v, rotate                        …, final norm

The model knows nothing of it: while it is captured, its attention ends one graph and begins the next. Padding rows at
the end of a step compute something that nobody reads.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from multilora.attention.base import PieceAttention
from multilora.attention.rotate import CosSin
from multilora.batch import ForwardBatch
from multilora.layers.context import ForwardContext
from multilora.lora.base import LoraBackend
from multilora.models.base import CausalLM

logger = logging.getLogger(__name__)

SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
"""Rows. Larger steps take the GPU about as long as the host, and LoRA's grids follow their adapters."""


class _Cut:
    """Stands where a layer's attention stands, during a capture."""

    def __init__(self, attention: PieceAttention, cut: Callable[[], None]):
        self._attention = attention
        self._cut = cut

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: CosSin) -> Tensor:
        self._attention.rotate(layer, q, k, v, rope)
        self._cut()
        return self._attention.out


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


@dataclass(frozen=True)
class _Pieces:
    graphs: list[torch.cuda.CUDAGraph]  # layers + 1
    hidden: Tensor  # [size, hidden]


class PiecewiseCudaGraphs:
    """All captured pieces of one engine. lora: None when LoRA is off."""

    def __init__(
        self,
        model: CausalLM,
        attention: dict[int, PieceAttention],
        lora: LoraBackend | None,
        device: torch.device,
    ):
        """attention: by number of rows, the backend's `for_pieces(rows)`."""
        self._model = model
        self._attention = attention
        self._lora = lora
        self._device = device
        most = max(attention)
        width, dtype = model.config.hidden_size, model.config.dtype
        self._rows = torch.zeros(most, width, dtype=dtype, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._pieces: dict[tuple[int, bool], _Pieces] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Record everything, largest first so that the smaller ones reuse its memory. Nothing else may run."""
        started = monotonic()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))  # buffers are being filled there
        work = [(size, lora) for size in sorted(self._attention, reverse=True) for lora in (False, True)]
        with torch.cuda.stream(stream):
            for size, lora in tqdm(work, desc="Capturing small steps with prompts", unit="size"):
                if not lora or self._prepare_lora((), size):
                    self._pieces[size, lora] = self._capture(size, lora, pool)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.empty_cache()  # what was computed before the captures
        logger.info("captured %d sizes of steps with prompts in %.1f s", len(self._pieces), monotonic() - started)

    def _capture(self, size: int, lora: bool, pool: Any) -> _Pieces:
        backend = self._lora if lora else None

        def forward(cut: Callable[[], None]) -> Tensor:
            context = ForwardContext(_Cut(self._attention[size], cut), backend)
            return self._model(self._rows[:size], self._positions[:size], context)

        forward(lambda: None)  # compiles and allocates outside the graphs
        torch.cuda.synchronize(self._device)
        with _Recorder(pool) as recorder:
            hidden = forward(recorder.cut)
        return _Pieces(recorder.graphs, hidden)

    def run(self, x: Tensor, batch: ForwardBatch) -> Tensor | None:
        """Replay the layers of a step. x: its rows, embedded, [rows, hidden].

        Returns their hidden rows, valid until the next replay; None if the step is too large or its adapters do not
        fit.
        """
        count = len(x)
        size = min((s for s in self._attention if s >= count), default=None)
        if size is None or (batch.lora and not self._prepare_lora(batch.lora, size)):
            return None
        self._rows[:count] = x
        self._positions[:count] = batch.positions
        attention, pieces = self._attention[size], self._pieces[size, bool(batch.lora)]
        attention.prepare(batch.attention)
        *before, last = pieces.graphs
        for layer, graph in enumerate(before):
            graph.replay()
            attention.attend(layer)
        last.replay()
        return pieces.hidden[:count]

    def _prepare_lora(self, segments: tuple, size: int) -> bool:
        """Put the segments where the graphs look for them. False if they cannot."""
        if self._lora is None:
            return False
        self._lora.prepare(segments, size)
        return self._lora.replayable
