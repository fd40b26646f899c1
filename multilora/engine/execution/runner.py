"""From a plan to tensors, through the model, to tokens: the only file of the engine that touches the device.

`launch` queues a step and returns at once; the step's tokens can feed the next one on the device before the host has
seen them. Owns the model, the attention and LoRA backends and the sampler; knows requests only to read their ids and
sampling state. Called by `engine/engine.py`.
"""

import itertools
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from multilora.attention.base import AttentionBackend
from multilora.batch import ForwardBatch, LoraSegment
from multilora.engine.execution.cuda_graph import DecodeCudaGraphs
from multilora.engine.execution.inputs import StepInputs, build_inputs, fill_unknown, logit_positions
from multilora.engine.execution.piecewise_cuda_graph import PiecewiseCudaGraphs
from multilora.engine.plan import Chunk, StepPlan, StepResult
from multilora.engine.sampling.logprobs import TokenLogprobs, token_logprobs
from multilora.engine.sampling.sampler import DeviceSampled, Sampler, SampleRow
from multilora.engine.scheduling.request import Request
from multilora.layers.context import ForwardContext
from multilora.lora.base import LoraBackend
from multilora.lora.full_weights import FullWeightModules
from multilora.lora.sites import EMBED, MODEL_LEVEL, TABLES, LoraSite
from multilora.lora.table import LoraTable
from multilora.models.base import CausalLM
from multilora.transfer import Fence, upload


@dataclass(frozen=True)
class Launched:
    """A step on its way. `sampled` and `prompt` are on the host, complete when `fence` has passed."""

    plan: StepPlan
    sampled: DeviceSampled
    prompt: list[TokenLogprobs | None]  # per chunk, where prompt logprobs were asked for
    fence: Fence

    def result(self) -> StepResult:
        """Wait for the step and read it."""
        self.fence.wait()
        sampled = self.sampled.to_host()
        prompt = [p.to_host() if p is not None else ([], []) for p in self.prompt]
        return StepResult(
            sampled.token_ids,
            sampled.logprobs,
            sampled.top_logprobs,
            sampled.errors,
            [values for values, _ in prompt],
            [tops for _, tops in prompt],
        )


class AdapterScope(IntEnum):
    """Where the adapters of a step act."""

    LAYERS = 0  # by low rank in the decoder layers, as most do
    ENDS = 1  # on the embedding or the head, too
    MODULES = 2  # instead of modules between those two: no graph serves that


ENDS = {(MODEL_LEVEL, table) for table in TABLES}


class RunnerLora:
    """What a step needs of LoRA: the backend, and the table for what goes beyond it."""

    def __init__(self, backend: LoraBackend, table: LoraTable, sites: tuple[LoraSite, ...]):
        self.backend = backend
        self._table = table
        self._model_level = frozenset(s.index for s in sites if s.layer == MODEL_LEVEL)
        self._embed_site = next(s.index for s in sites if s.name == EMBED)

    def scope(self, segments: tuple[LoraSegment, ...]) -> AdapterScope:
        """Of the adapter among them that goes furthest."""
        return max((self._scope_of(p) for s in segments for p in s.slots), default=AdapterScope.LAYERS)

    def _scope_of(self, slot: int) -> AdapterScope:
        layout, _ = self._table.lookup(slot)
        modules = {(w.layer, w.module) for w in layout.shape.full_weights}
        if modules - ENDS:
            return AdapterScope.MODULES
        return AdapterScope.ENDS if modules or not self._model_level.isdisjoint(layout.sites) else AdapterScope.LAYERS

    def full_weight_modules(self, segments: tuple[LoraSegment, ...]) -> FullWeightModules:
        return FullWeightModules(self._table, segments, self._embed_site)


@dataclass(frozen=True)
class Graphs:
    """What is replayed instead of launched; None: nothing of the kind."""

    decodes: DecodeCudaGraphs | None = None
    pieces: PiecewiseCudaGraphs | None = None


class Runner:
    """lora: None when LoRA is off."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        lora: RunnerLora | None,
        page_size: int,
        device: torch.device,
        graphs: Graphs = Graphs(),
    ):
        self.vocab_size = model.config.vocab_size
        self._graphs = graphs
        self._model = model
        self._attention = attention
        self._lora = lora
        self._page_size = page_size
        self._device = device
        self._sampler = Sampler(model.config.vocab_size, device)
        self._newest: tuple[dict[Request, int], Tensor] = ({}, torch.empty(0))  # who sampled last, and what

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Queue the forward pass and the sampling of a plan."""
        logits = self._forward(plan)
        sampled = self._sample(plan, logits)
        prompt = [_prompt_logprobs(c, part) for c, part in zip(plan.chunks, _split(plan, logits), strict=True)]
        on_host = [p.to_cpu() if p is not None else None for p in prompt]
        return Launched(plan, sampled.to_cpu(), on_host, Fence(self._device))

    def _forward(self, plan: StepPlan) -> Tensor:
        """fp32 logits [wanted rows, vocab], see `logit_positions`."""
        inputs = build_inputs(plan, self._page_size, self._device)
        batch = inputs.batch
        self._fill_unknown(batch.input_ids, inputs)
        scope = self._lora.scope(batch.lora) if self._lora is not None else AdapterScope.LAYERS
        x = self._model.embed(batch.input_ids, self._context(batch.lora, scope))
        hidden = self._replay(plan, x, batch) if scope < AdapterScope.MODULES else None
        if hidden is None:
            hidden = self._layers(x, batch, scope)[batch.logit_rows]
        if scope is AdapterScope.LAYERS:
            return self._model.logits(hidden, self._context((), scope))
        return self._model.logits(hidden, self._prepared(batch.logit_lora, len(hidden), scope))

    def _replay(self, plan: StepPlan, x: Tensor, batch: ForwardBatch) -> Tensor | None:
        """The layers as graphs, if there are some for such a step: the hidden rows whose logits are wanted."""
        decodes, pieces = self._graphs.decodes, self._graphs.pieces
        if decodes is not None and all(c.count == 1 and c.sample for c in plan.chunks):
            return decodes.run(x, batch)
        hidden = pieces.run(x, batch) if pieces is not None else None
        return hidden[batch.logit_rows] if hidden is not None else None

    def _layers(self, x: Tensor, batch: ForwardBatch, scope: AdapterScope) -> Tensor:
        self._attention.prepare(batch.attention)
        return self._model(x, batch.positions, self._prepared(batch.lora, len(x), scope))

    def _prepared(self, segments: tuple[LoraSegment, ...], rows: int, scope: AdapterScope) -> ForwardContext:
        """With the adapters ready for `rows` rows."""
        if segments and self._lora is not None:
            self._lora.backend.prepare(segments, rows)
        return self._context(segments, scope)

    def _context(self, segments: tuple[LoraSegment, ...], scope: AdapterScope) -> ForwardContext:
        if not segments or self._lora is None:
            return ForwardContext(self._attention, None)
        full_weights = self._lora.full_weight_modules(segments) if scope > AdapterScope.LAYERS else None
        return ForwardContext(self._attention, self._lora.backend, full_weights)

    def _fill_unknown(self, ids: Tensor, inputs: StepInputs) -> None:
        if inputs.unknown:
            index, tokens = self._newest
            fill_unknown(ids, [(row, index[chunk.request]) for row, chunk in inputs.unknown], tokens)

    def _sample(self, plan: StepPlan, logits: Tensor) -> DeviceSampled:
        """Choose a token for each chunk that samples."""
        sampling = [c for c in plan.chunks if c.sample]
        if len(sampling) < len(logits):
            ends = itertools.accumulate(len(logit_positions(c)) for c in plan.chunks)
            last = [end - 1 for end, c in zip(ends, plan.chunks, strict=True) if c.sample]
            logits = logits[upload(last, self._device)]
        sampled = self._sampler.sample(logits, [_sample_row(c) for c in sampling])
        self._newest = ({c.request: i for i, c in enumerate(sampling)}, sampled.token_ids)
        return sampled


def _sample_row(chunk: Chunk) -> SampleRow:
    request = chunk.request
    return SampleRow(
        params=request.params,
        seed=request.seed,
        position=chunk.answer_index,
        output_ids=request.output_ids,
        edits=request.edits,
        grammar=request.grammar,
        top_logprobs=request.top_logprobs,
    )


def _split(plan: StepPlan, logits: Tensor) -> list[Tensor]:
    return list(logits.split([len(logit_positions(c)) for c in plan.chunks]))


def _prompt_logprobs(chunk: Chunk, logits: Tensor) -> TokenLogprobs | None:
    """logits: the chunk's rows. Position p gives the logprob of the prompt's token p + 1."""
    positions = chunk.logprob_positions
    if not positions:
        return None
    next_ids = upload(chunk.request.prompt_ids[positions.start + 1 : positions.stop + 1], logits.device)
    return token_logprobs(logits[: len(positions)], next_ids, chunk.request.top_logprobs)
