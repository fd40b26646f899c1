"""From a plan to tensors, through the model, to tokens.

`forward` and `sample` queue the two halves of a step and return at once; the step's tokens can feed the next one on
the device before the host has seen them. Owns the model, the attention and LoRA backends, the sampler, and what plans
change: page tables and the LoRA table. Knows no request, only slots. Called by `engine/engine.py`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from multilora.attention.base import AttentionBackend
from multilora.batch import ForwardBatch, LoraSegment
from multilora.engine.execution.cuda_graphs import GraphedStep, StepGraphs
from multilora.engine.execution.inputs import Newest, PageTables, build_inputs, logit_count, logit_segments
from multilora.engine.execution.pooling import PooledRows, Pooler
from multilora.engine.plan import Chunk, LoraChange, LoraInstall, LoraRemoval, StepPlan, StepResult
from multilora.engine.sampling.logprobs import TokenLogprobs, token_logprobs
from multilora.engine.sampling.sampler import DeviceSampled, Sampled, Sampler
from multilora.layers.context import ForwardContext
from multilora.lora.base import LoraBackend
from multilora.lora.full_weights import FullWeightModules
from multilora.lora.panels import AdapterShape, PanelLayout
from multilora.lora.sites import EMBED, MODEL_LEVEL, SCORE, TABLES, LoraSite
from multilora.lora.table import LoraTable
from multilora.models.base import CausalLM
from multilora.params import SamplingParams
from multilora.transfer import Fence, upload


class AdapterScope(IntEnum):
    """Where the adapters of a step act."""

    LAYERS = 0  # by low rank in the decoder layers, as most do
    ENDS = 1  # on the embedding or the head, too
    MODULES = 2  # instead of modules between those two: no graph serves that


ENDS = {(MODEL_LEVEL, module) for module in (*TABLES, SCORE)}


class RunnerLora:
    """What a step needs of LoRA: the backend, and the table, which follows the plans.

    layout_of: how an adapter of a shape lies in its pages.
    """

    def __init__(
        self,
        backend: LoraBackend,
        table: LoraTable,
        sites: tuple[LoraSite, ...],
        layout_of: Callable[[AdapterShape], PanelLayout],
    ):
        self.backend = backend
        self._table = table
        self._layout_of = layout_of
        self._model_level = frozenset(s.index for s in sites if s.layer == MODEL_LEVEL)
        self._embed_site = next(s.index for s in sites if s.name == EMBED)

    def apply(self, changes: Sequence[LoraChange]) -> None:
        """Bring the table up to date, in order."""
        for change in changes:
            match change:
                case LoraInstall(slot, shape, pages):
                    self._table.install(slot, self._layout_of(shape), pages)
                case LoraRemoval(slot):
                    self._table.remove(slot)

    def scope(self, segments: tuple[LoraSegment, ...]) -> AdapterScope:
        """The scope of the adapter among them that reaches furthest."""
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
class Forward:
    """A forward pass on its way. logits: fp32 [wanted rows, vocab], see `logit_count`. pooled: None: no prompt ends
    that was to be pooled."""

    plan: StepPlan
    logits: Tensor
    pooled: PooledRows | None


@dataclass(frozen=True)
class Launched:
    """A step on its way, sampling included. `prompt`: on the host once `fence` has passed; None: not asked for."""

    plan: StepPlan
    sampled: DeviceSampled
    prompt: list[TokenLogprobs | None]  # per chunk
    pooled: PooledRows | None  # as in `Forward`
    fence: Fence
    read: Callable[[DeviceSampled], Sampled]

    def result(self) -> StepResult:
        """Wait for the step and read it: once, and in the order of the steps."""
        self.fence.wait()
        sampled = self.read(self.sampled)
        prompt = [p.to_host() if p is not None else [] for p in self.prompt]
        pooled = {} if self.pooled is None else self.pooled.by_chunk(self.plan.chunks)
        return StepResult(sampled.token_ids, sampled.errors, sampled.logprobs, prompt, pooled)


class Runner:
    """lora: None when LoRA is off; graphs: None where every step is launched layer by layer; cascade: tell the
    attention which pages decodes share, where it is worth it to read those once."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        lora: RunnerLora | None,
        tables: PageTables,
        device: torch.device,
        graphs: StepGraphs | None = None,
        *,
        cascade: bool = False,
    ):
        self._cascade = cascade
        self.vocab_size = model.config.vocab_size
        self._graphs = graphs
        self._model = model
        self._attention = attention
        self._lora = lora
        self._device = device
        self._tables = tables
        self._pooler = Pooler()
        self._sampler = Sampler(model.config.vocab_size, device, model.config.eos_token_ids)
        self._newest = Newest({}, torch.empty(0, dtype=torch.int64))

    def use_graphs(self, graphs: StepGraphs | None) -> None:
        """Launch steps by these graphs from now on. No step is in flight."""
        self._graphs = graphs

    def use_tokenizer(self, info: str) -> None:
        """See `Sampler.use_tokenizer`."""
        self._sampler.use_tokenizer(info)

    def grammar_ready(self, grammar: str) -> bool:
        """See `Sampler.grammar_ready`."""
        return self._sampler.grammar_ready(grammar)

    def check_sampling(self, params: SamplingParams, vocab_size: int, grammar: str | None) -> None:
        """Raise BadRequest for what could not be sampled: see `Sampler.check`."""
        self._sampler.check(params, vocab_size, grammar)

    def apply(self, plan: StepPlan) -> None:
        """Bring what is kept from step to step up to date. Plans come in order, none is left out."""
        for slot in plan.free:
            self._sampler.free(slot)
            self._pooler.free(slot)
        for state in plan.install:
            self._sampler.install(state)
        self._tables.update(plan.pages)
        if self._lora is not None:
            self._lora.apply(plan.lora)

    def forward(self, plan: StepPlan) -> Forward:
        """Queue the forward pass of the plan that has been applied last. Needs no token on the host: what is unknown
        there is on the device. It is sampled before the next plan is applied, unless it fails."""
        return self._forward(plan)

    def is_sound(self, error: Exception) -> bool:
        """Whether the device can go on after `error` of `forward` or `sample`: not after an error of CUDA's."""
        if self._device.type != "cuda":
            return True
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            return False
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True

    def needs_tokens(self, plan: StepPlan) -> bool:
        """Whether the steps before must have been read before this one can be sampled, as grammars want it."""
        return self._sampler.needs_tokens(plan.sampling_slots)

    @torch.inference_mode()
    def sample(self, forward: Forward) -> Launched:
        """Queue the sampling of a step, and the copies of its results to the host."""
        chunks, logits = forward.plan.chunks, forward.logits
        parts = torch.split(logits, [logit_count(c) for c in chunks])
        slots = forward.plan.sampling_slots
        positions = [position for c in chunks for position in c.answer_positions]
        rows = self._sampling_rows(chunks, logits, len(slots))
        sampled = self._sampler.sample(rows, slots, positions)
        self._newest = Newest({slot: i for i, slot in enumerate(slots)}, sampled.token_ids)
        prompt = [_prompt_logprobs(c, part) for c, part in zip(chunks, parts, strict=True)]
        on_host = [p.to_cpu() if p is not None else None for p in prompt]
        pooled = None if forward.pooled is None else forward.pooled.to_cpu()
        return Launched(forward.plan, sampled.to_cpu(), on_host, pooled, Fence(self._device), self._sampler.read)

    def _sampling_rows(self, chunks: list[Chunk], logits: Tensor, count: int) -> Tensor:
        """Those rows of the logits that tokens are sampled from: the last ones of each chunk."""
        if count == len(logits):
            return logits
        ends = itertools.accumulate(logit_count(c) for c in chunks)
        rows = [row for end, c in zip(ends, chunks, strict=True) for row in range(end - len(c.answer_positions), end)]
        return logits[upload(rows, self._device)]

    @torch.inference_mode()
    def _forward(self, plan: StepPlan) -> Forward:
        batch = build_inputs(plan, self._tables, self._newest, self._device, cascade=self._cascade)
        scope = self._lora.scope(batch.lora) if self._lora is not None else AdapterScope.LAYERS
        x = self._model.embed(batch.input_ids, self._context(batch.lora, scope))
        graphed = self._graphed(plan, batch, scope)
        hidden = self._layers(x, batch, scope) if graphed is None else graphed.run(x)
        pooled = self._pooled(plan.chunks, hidden, batch, scope)
        if len(batch.logit_rows) < len(hidden):
            hidden = hidden[batch.logit_rows]
        return Forward(plan, self._logits(hidden, batch, scope), pooled)

    def _pooled(
        self, chunks: Sequence[Chunk], hidden: Tensor, batch: ForwardBatch, scope: AdapterScope
    ) -> PooledRows | None:
        """hidden: all rows of the step."""
        rows = self._pooler.pool(chunks, hidden)
        if rows is None:
            return None
        ends = itertools.accumulate(c.count for c in chunks)
        scored = [
            (c.pooling.params.scores, end - 1)
            for c, end in zip(chunks, ends, strict=True)
            if c.pooling is not None and c.pooling.ends
        ]
        with_head = [i for i, (scores, _) in enumerate(scored) if scores]
        if not with_head:
            return PooledRows(rows, None)
        segments = logit_segments(batch.lora, [row for scores, row in scored if scores])
        context = self._context(segments, scope)
        if len(with_head) == len(scored):
            return PooledRows(None, self._model.scores(rows, context))
        without = [i for i, (scores, _) in enumerate(scored) if not scores]
        scores = self._model.scores(rows[upload(with_head, self._device)], context)
        return PooledRows(rows[upload(without, self._device)], scores)

    def _logits(self, hidden: Tensor, batch: ForwardBatch, scope: AdapterScope) -> Tensor:
        """hidden: the wanted rows. Returns fp32 [wanted rows, vocab]. Where none is wanted the head does not run."""
        if not len(hidden):
            return hidden.new_empty(0, self.vocab_size, dtype=torch.float32)
        if scope is AdapterScope.LAYERS:
            return self._model.logits(hidden, self._context((), scope))
        return self._model.logits(hidden, self._prepared(batch.logit_lora, len(hidden), scope))

    def _graphed(self, plan: StepPlan, batch: ForwardBatch, scope: AdapterScope) -> GraphedStep | None:
        """The layers as graphs, if there are some for such a step."""
        if self._graphs is None or scope is AdapterScope.MODULES:
            return None
        return self._graphs.prepare(batch, decodes=all(c.count == 1 and c.answer_positions for c in plan.chunks))

    def _layers(self, x: Tensor, batch: ForwardBatch, scope: AdapterScope) -> Tensor:
        """x: embedded rows [tokens, hidden]. Returns their hidden rows."""
        self._attention.prepare(batch.attention)
        hidden: Tensor = self._model(x, batch.positions, self._prepared(batch.lora, len(x), scope))
        return hidden

    def _prepared(self, segments: tuple[LoraSegment, ...], rows: int, scope: AdapterScope) -> ForwardContext:
        """The context with the adapters ready for `rows` rows."""
        if segments and self._lora is not None:
            self._lora.backend.prepare(segments, rows)
        return self._context(segments, scope)

    def _context(self, segments: tuple[LoraSegment, ...], scope: AdapterScope) -> ForwardContext:
        if not segments or self._lora is None:
            return ForwardContext(self._attention, None)
        full_weights = self._lora.full_weight_modules(segments) if scope > AdapterScope.LAYERS else None
        return ForwardContext(self._attention, self._lora.backend, full_weights)


def _prompt_logprobs(chunk: Chunk, logits: Tensor) -> TokenLogprobs | None:
    """logits: the chunk's rows. Position p gives the logprob of the prompt's token p + 1."""
    wanted = chunk.prompt_logprobs
    if wanted is None:
        return None
    ids = upload(wanted.next_ids, logits.device)
    return token_logprobs(logits[: len(wanted.next_ids)], ids, wanted.top, ranks=wanted.ranks)
