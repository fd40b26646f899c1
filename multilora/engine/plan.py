"""What one step does, as data: made by the scheduler, executed by a runner, the same bytes for every rank.

Names no request: a runner keeps what lasts from step to step (page tables, sampling state, the token that was sampled
last) under a request's *slot*, a small integer that belongs to one request from its first step until every step with
it has been read. Steps must be executed in order, each of them: page tables and LoRA tables travel as changes.

What does not travel yet: the copies of adapters from the host. A rank has to have copied an adapter to the pages that
`LoraInstall` names before it executes the step.
"""

from dataclasses import dataclass, field

import msgspec

from multilora.engine.messages import Logprobs
from multilora.engine.sampling.state import SamplingState
from multilora.lora.panels import AdapterShape
from multilora.params import PoolingParams


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of `next_ids`, each under the logits of one of the positions `first`, `first + 1`, … of the prompt.

    top: how many of the best tokens are wanted with each. ranks: whether each one's rank is wanted.
    """

    first: int
    next_ids: list[int]
    top: int
    ranks: bool = False


class PooledChunk(msgspec.Struct, frozen=True, array_like=True):
    """What the hidden rows of a chunk are wanted for.

    ends: with this chunk the prompt is complete, and so is its pooled row.
    """

    params: PoolingParams
    ends: bool


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, start + count) of the request at `slot`.

    token_ids: [count]; empty: it is one token, the last one that `slot` sampled in the step before.
    lora_slots, lora_weights: the adapters that act on it, in the LoRA table, and the weight of each.
    pre_activation: so many of its first tokens come before activation: no adapter acts on them.
    answer_positions: a token is sampled after each of the last so many tokens; its index within the answer.
    decodes: it is the newest token of an answer, not a piece of a prompt, and the draft of what follows it.
    """

    slot: int
    start: int
    count: int
    token_ids: list[int]
    lora_slots: tuple[int, ...] = ()
    lora_weights: tuple[float, ...] = ()
    pre_activation: int = 0
    answer_positions: tuple[int, ...] = ()
    decodes: bool = False
    prompt_logprobs: PromptLogprobs | None = None
    pooling: PooledChunk | None = None


class PageUpdate(msgspec.Struct, frozen=True, array_like=True):
    """The pages of `slot` from the `first`-th on, block after block. What was known from there on no longer holds.
    -1: no layer reads the page any more."""

    slot: int
    first: int
    pages: list[int]


class LoraInstall(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An adapter of this shape lies in these arena pages; its LoRA slot is `slot` until the removal."""

    slot: int
    shape: AdapterShape
    pages: list[int]


class LoraRemoval(msgspec.Struct, frozen=True, array_like=True, tag=True):
    slot: int


LoraChange = LoraInstall | LoraRemoval


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """Chunks ordered by adapter, base first. Steps are numbered from 1.

    Before the chunks run, in this order: `free` ends the use of slots, `install` begins it, `pages` and `lora` bring
    the tables up to date.
    """

    number: int
    chunks: list[Chunk]
    free: list[int] = []
    install: list[SamplingState] = []
    pages: list[PageUpdate] = []
    lora: list[LoraChange] = []

    @property
    def tokens(self) -> int:
        return sum(c.count for c in self.chunks)

    @property
    def prompt_tokens(self) -> int:
        return sum(c.count for c in self.chunks if not c.decodes)

    @property
    def drafted_tokens(self) -> int:
        return sum(len(c.answer_positions) - 1 for c in self.chunks if c.answer_positions)

    @property
    def sampling_slots(self) -> list[int]:
        """The slot of each token that is sampled, in plan order."""
        return [c.slot for c in self.chunks for _ in c.answer_positions]

    def encode(self) -> bytes:
        return _encoder.encode(self)

    @staticmethod
    def decode(data: bytes) -> "StepPlan":
        """Raises msgspec.ValidationError for what is no plan."""
        return _decoder.decode(data)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StepPlan)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a plan, on the host.

    token_ids, errors, logprobs: parallel to the sampled tokens, in plan order; logprobs None where not asked for.
    prompt_logprobs: per chunk of the plan, parallel to `next_ids` of its `PromptLogprobs`.
    pooled: by the number of the chunk that ends a prompt, its pooled row in float32 numbers, little-endian.
    """

    token_ids: list[int]
    errors: list[str | None]
    logprobs: list[Logprobs | None]
    prompt_logprobs: list[list[Logprobs]]
    pooled: dict[int, bytes] = field(default_factory=dict)
