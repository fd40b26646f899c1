"""From a plan to tensors, through the model, to tokens: the only file of the engine that touches the device.

Owns the model, the attention and LoRA backends and the sampler; knows requests only to read their ids and sampling
state. Called by `engine/engine.py`.
"""

import itertools

import torch
from torch import Tensor

from multilora.attention.base import AttentionBackend
from multilora.batch import AttentionMeta, ForwardBatch, LoraSegment
from multilora.engine.logprobs import token_logprobs
from multilora.engine.plan import Chunk, StepPlan, StepResult
from multilora.engine.sampler import Sampler, SampleRow
from multilora.layers.context import ForwardContext
from multilora.lora.base import LoraBackend
from multilora.models.llama import LlamaForCausalLM


class Runner:
    """lora: None when LoRA is off."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        attention: AttentionBackend,
        lora: LoraBackend | None,
        page_size: int,
        device: torch.device,
    ):
        self._model = model
        self._attention = attention
        self._lora = lora
        self._page_size = page_size
        self._device = device
        self.vocab_size = model.config.vocab_size
        self._sampler = Sampler(model.config.vocab_size, device)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Tensor:
        """Run the model over the plan's tokens. Returns fp32 logits [wanted rows, vocab] (see `_rows`)."""
        batch = self._batch(plan)
        self._attention.prepare(batch.attention)
        if batch.lora:
            assert self._lora is not None
            self._lora.prepare(batch.lora, len(batch.input_ids))
        hidden = self._model(batch, ForwardContext(self._attention, self._lora if batch.lora else None))
        return self._model.logits(hidden[batch.logit_rows])

    @torch.inference_mode()
    def sample(self, plan: StepPlan, logits: Tensor) -> StepResult:
        """Choose the tokens of the chunks that sample, and read off the prompt logprobs that were asked for."""
        sampling = [c for c in plan.chunks if c.sample]
        if len(sampling) == len(logits):
            own = logits
        else:
            ends = itertools.accumulate(len(_rows(c)) for c in plan.chunks)
            own = logits[[end - 1 for end, c in zip(ends, plan.chunks, strict=True) if c.sample]]
        sampled = self._sampler.sample(own, [_sample_row(c) for c in sampling]).to_host()
        prompt = [_prompt_logprobs(c, part) for c, part in zip(plan.chunks, _split(plan, logits), strict=True)]
        return StepResult(
            sampled.token_ids,
            sampled.logprobs,
            sampled.top_logprobs,
            sampled.errors,
            [values for values, _ in prompt],
            [tops for _, tops in prompt],
        )

    def _batch(self, plan: StepPlan) -> ForwardBatch:
        ids: list[int] = []
        positions: list[int] = []
        pages: list[int] = []
        rows: list[int] = []
        for chunk in plan.chunks:
            first, end = chunk.start, chunk.start + chunk.count
            rows += [len(ids) + p - first for p in _rows(chunk)]
            ids += _token_ids(chunk)
            positions += range(first, end)
            table = chunk.request.table.pages
            pages += [table[p // self._page_size] for p in range(first, end)]
        position = self._tensor(positions)
        meta = AttentionMeta(
            q_lens=tuple(c.count for c in plan.chunks),
            kv_lens=tuple(c.start + c.count for c in plan.chunks),
            page_table=self._page_table(plan),
            token_page=self._tensor(pages),
            token_slot=position % self._page_size,
        )
        return ForwardBatch(self._tensor(ids), position, meta, _segments(plan), self._tensor(rows))

    def _page_table(self, plan: StepPlan) -> Tensor:
        used = [c.request.table.pages[: -(-(c.start + c.count) // self._page_size)] for c in plan.chunks]
        width = max(len(pages) for pages in used)
        return self._tensor([pages + [0] * (width - len(pages)) for pages in used])

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _rows(chunk: Chunk) -> list[int]:
    """Positions whose logits are wanted: for prompt logprobs, then the last one if a token is sampled."""
    rows = list(chunk.logprob_positions)
    last = chunk.start + chunk.count - 1
    return [*rows, last] if chunk.sample else rows


def _token_ids(chunk: Chunk) -> list[int]:
    request, end = chunk.request, chunk.start + chunk.count
    prompt = len(request.prompt_ids)
    return (
        request.prompt_ids[chunk.start : end]
        + request.output_ids[max(0, chunk.start - prompt) : max(0, end - prompt)]
    )


def _segments(plan: StepPlan) -> tuple[LoraSegment, ...]:
    """Neighbouring rows of the same adapter; chunks come ordered by adapter."""
    segments: list[LoraSegment] = []
    row = 0
    for place, group in itertools.groupby(plan.chunks, key=lambda c: c.place):
        end = row + sum(c.count for c in group)
        if place is not None:
            segments.append(LoraSegment(row, end, (place,), (1.0,)))
        row = end
    return tuple(segments)


def _sample_row(chunk: Chunk) -> SampleRow:
    request = chunk.request
    return SampleRow(
        params=request.params,
        seed=request.seed,
        position=len(request.output_ids),
        output_ids=request.output_ids,
        edits=request.edits,
        grammar=request.grammar,
        top_logprobs=request.top_logprobs,
    )


def _split(plan: StepPlan, logits: Tensor) -> list[Tensor]:
    return list(logits.split([len(_rows(c)) for c in plan.chunks]))


def _prompt_logprobs(chunk: Chunk, logits: Tensor) -> tuple[list[float | None], list[list[tuple[float, int]]]]:
    """logits: the chunk's rows. Position p gives the logprob of the prompt's token p + 1."""
    positions = chunk.logprob_positions
    if not positions:
        return [], []
    next_ids = torch.tensor(chunk.request.prompt_ids[positions.start + 1 : positions.stop + 1], device=logits.device)
    return token_logprobs(logits[: len(positions)], next_ids, chunk.request.top_logprobs).to_host()
