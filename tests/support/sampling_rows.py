"""Rows to sample, as tests write them down."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from multilora.engine.sampling.batch import SamplingBatch, SlotTable
from multilora.engine.sampling.sampler import Sampled, Sampler
from multilora.engine.sampling.state import SamplingState
from multilora.params import SamplingParams

LATE = 1 << 20  # a position that min_new_tokens does not reach


def batch_of(params: list[SamplingParams], seeds: list[int], positions: list[int]) -> SamplingBatch:
    """The numbers of rows that edit nothing."""
    table = SlotTable()
    for slot, (some, seed) in enumerate(zip(params, seeds, strict=True)):
        table.set(SamplingState(slot=slot, params=some, seed=seed, vocab_size=0), 0, 0, (0, 0))
    return table.batch(np.arange(len(params), dtype=np.int32), np.array(positions, dtype=np.int32))


@dataclass
class Row:
    """A request that gets a token; `output`: its answer so far."""

    position: int | None = None  # None: the length of the output
    seed: int = 0
    output: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    grammar: str | None = None
    top_logprobs: int = -1
    ranks: bool = False
    processed: bool = False
    vocab_size: int = 0  # 0: the sampler's
    fields: dict[str, Any] = field(default_factory=dict)

    def install(self, sampler: Sampler, slot: int) -> None:
        """In a slot, with the output already sampled there, as the counts of penalties want it."""
        state = SamplingState(
            slot=slot,
            params=SamplingParams(**self.fields),
            seed=self.seed,
            prompt_ids=list(self.prompt),
            end_ids=self.ends,
            vocab_size=self.vocab_size or sampler.vocab_size,
            top_logprobs=self.top_logprobs,
            ranks=self.ranks,
            processed=self.processed,
            grammar=self.grammar,
        )
        sampler.install(state)
        for token in self.output:
            logits = torch.full((1, state.vocab_size), -1e35)
            logits[0, token] = 1e35  # no edit can change what is sampled from these
            sampled = sampler.sample(logits.to(sampler.device), [slot], [LATE])
            assert sampler.read(sampled.to_cpu()).token_ids == [token]


def row(position: int | None = None, **fields: Any) -> Row:
    own = {name: fields.pop(name) for name in list(fields) if name in Row.__dataclass_fields__}
    return Row(position, **own, fields=fields)


def sample(sampler: Sampler, logits: torch.Tensor, rows: list[Row]) -> Sampled:
    """One step with a new request per row, which ends afterwards."""
    for slot, some in enumerate(rows):
        some.install(sampler, slot)
    positions = [len(r.output) if r.position is None else r.position for r in rows]
    sampled = sampler.read(sampler.sample(logits, list(range(len(rows))), positions).to_cpu())
    for slot in range(len(rows)):
        sampler.free(slot)
    return sampled
