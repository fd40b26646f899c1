"""From a plan to tensors, through the model, to tokens: the only file of the engine that touches the device.

`launch` queues a step and returns at once; the step's tokens can feed the next one on the device before the host has
seen them. Owns the model, the attention and LoRA backends and the sampler; knows requests only to read their ids and
sampling state. Called by `engine/engine.py`.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora.attention.base import AttentionBackend
from multilora.engine.cuda_graph import DecodeGraphs
from multilora.engine.inputs import StepInputs, build_inputs, fill_unknown, logit_positions
from multilora.engine.logprobs import TokenLogprobs, token_logprobs
from multilora.engine.plan import Chunk, StepPlan, StepResult
from multilora.engine.request import Request
from multilora.engine.sampler import DeviceSampled, Sampler, SampleRow
from multilora.engine.upload import Fence, upload
from multilora.layers.context import ForwardContext
from multilora.lora.base import LoraBackend
from multilora.models.llama import LlamaForCausalLM


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


class Runner:
    """lora: None when LoRA is off."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        attention: AttentionBackend,
        lora: LoraBackend | None,
        page_size: int,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
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
        if self._graphs is not None and all(c.count == 1 and c.sample for c in plan.chunks):
            logits = self._graphs.run(batch)
            if logits is not None:
                return logits
        self._attention.prepare(batch.attention)
        if batch.lora:
            assert self._lora is not None
            self._lora.prepare(batch.lora, len(batch.input_ids))
        hidden = self._model(batch, ForwardContext(self._attention, self._lora if batch.lora else None))
        return self._model.logits(hidden[batch.logit_rows])

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
