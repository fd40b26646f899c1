"""Decode steps as CUDA graphs, by padded batch size, with and without LoRA.

A graph holds the decoder layers of a batch in which every request has one new token, from embedded rows to hidden
ones. What varies from step to step lies in buffers that stay at their place: rows and positions here, page tables in
the attention backend's twin, adapters in the LoRA backend's tables. So no adapter, rank or mix ever needs a new
capture. Embedding and head come before and after, as in any step: what an adapter does to them is no business of a
graph.
"""

import logging
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from multilora.attention.base import StepAttention
from multilora.batch import AttentionMeta, ForwardBatch
from multilora.layers.context import ForwardContext
from multilora.lora.base import LoraBackend
from multilora.models.base import CausalLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [size, hidden]


def graph_sizes(largest: int) -> list[int]:
    """1, 2, 4, then the multiples of 8, and `largest` itself."""
    return sorted(s for s in {1, 2, 4, *range(8, largest, 8), largest} if s <= largest)


class DecodeCudaGraphs:
    """All captured graphs of one engine. lora: None when LoRA is off."""

    def __init__(
        self,
        model: CausalLM,
        twins: dict[int, StepAttention],
        lora: LoraBackend | None,
        device: torch.device,
    ):
        """twins: by batch size, the attention backend's `for_graph(size)`."""
        self._model = model
        self._twins = twins
        self._lora = lora
        self._device = device
        width, dtype = model.config.hidden_size, model.config.dtype
        self._rows = {size: torch.zeros(size, width, dtype=dtype, device=device) for size in twins}
        self._positions = {size: torch.zeros(size, dtype=torch.int64, device=device) for size in twins}
        self._graphs: dict[tuple[int, bool], _Graph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every graph, largest first so that the smaller ones reuse its memory. Nothing else may run."""
        started = monotonic()
        pool = torch.cuda.graph_pool_handle()
        work = [(size, lora) for size in sorted(self._twins, reverse=True) for lora in (False, True)]
        for size, lora in tqdm(work, desc="Capturing decode graphs", unit="graph"):
            if not lora or self._prepare_lora((), size):
                self._graphs[size, lora] = self._capture(size, lora, pool)
        logger.info("captured %d decode graphs in %.1f s", len(self._graphs), monotonic() - started)

    def _capture(self, size: int, lora: bool, pool: Any) -> _Graph:
        zero = torch.zeros(1, dtype=torch.int64, device=self._device)
        meta = AttentionMeta((1,), (1,), zero[None], zero, zero)
        twin = self._twins[size]
        twin.prepare(meta)
        context = ForwardContext(twin, self._lora if lora else None)

        def forward() -> Tensor:
            return self._model(self._rows[size], self._positions[size], context)

        forward()  # compiles and allocates outside the graph
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            hidden = forward()
        return _Graph(graph, hidden)

    def run(self, x: Tensor, batch: ForwardBatch) -> Tensor | None:
        """Replay a batch of decodes. x: its rows, embedded, [rows, hidden].

        Returns their hidden rows, valid until the next replay; None if no graph serves it.
        """
        rows = len(x)
        size = next((s for s in sorted(self._twins) if s >= rows), None)
        if size is None or (batch.lora and not self._prepare_lora(batch.lora, size)):
            return None
        graph = self._graphs[size, bool(batch.lora)]
        self._rows[size][:rows] = x
        self._positions[size][:rows] = batch.positions
        self._twins[size].prepare(batch.attention)
        graph.graph.replay()
        return graph.hidden[:rows]

    def _prepare_lora(self, segments: tuple, size: int) -> bool:
        """Put the segments where the graphs look for them. False if they cannot."""
        if self._lora is None:
            return False
        self._lora.prepare(segments, size)
        return self._lora.replayable
