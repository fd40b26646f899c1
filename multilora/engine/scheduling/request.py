"""One object per request: few stored facts, the rest are properties.

num_tokens      prompt_ids + output_ids (+ in_flight tokens that are being sampled, not yet known)
num_computed    tokens whose KV is in pages and whose step has been committed
num_scheduled   num_computed, plus those of steps launched but not yet committed
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from multilora.engine.messages import Finished, Submit, TopLogprobs
from multilora.engine.sampling.grammar import GrammarState
from multilora.engine.sampling.logit_edits import LogitEdits
from multilora.memory.page_table import PageTable
from multilora.params import Composition, SamplingParams


@dataclass(frozen=True)
class PageNamespaces:
    """A request's namespaces of the prefix cache, by page: base, the page that activation falls into, the others."""

    base_pages: int = 0
    edge: int = 0
    rest: int = 0

    def of(self, page: int) -> int:
        if page < self.base_pages:
            return 0
        return self.edge if page == self.base_pages else self.rest


class RequestState(Enum):
    WAITING = "waiting"  # never ran, or preempted: holds no pages and no adapter
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """`order` rises with arrival. `adapters` act on the tokens from position `activation` on: on all but with
    activated LoRA; their versions ascend."""

    rid: str
    prompt_ids: list[int]
    params: SamplingParams
    adapters: Composition
    seed: int
    order: int
    arrival: float  # monotonic seconds
    top_logprobs: int = -1  # of output tokens: -1 none, 0 the chosen token's, k also the k best
    prompt_logprobs_from: int | None = None  # first prompt position whose logprob is wanted
    grammar: GrammarState | None = None
    edits: LogitEdits | None = None
    activation: int = 0

    state: RequestState = RequestState.WAITING
    output_ids: list[int] = field(default_factory=list)
    table: PageTable = field(default_factory=PageTable)
    num_computed: int = 0
    num_scheduled: int = 0
    in_flight: int = 0
    admitted: float | None = None  # when it first ran
    cached_tokens: int = 0  # of the prompt, when it first ran
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs | None] = field(default_factory=list)
    epoch: int = 0  # how often it was preempted
    hit_counted: bool = False  # counted as a hit or miss of its adapter
    queued_demand: bool = False  # counted among those that its adapters are kept for
    first_output_sent: bool = False  # an Output has gone out
    namespaces: PageNamespaces = field(default_factory=PageNamespaces)

    @classmethod
    def of(
        cls, message: Submit, invocation_tokens: tuple[int, ...] | None, *, seed: int, order: int, arrival: float
    ) -> "Request":
        """invocation_tokens: of its one adapter, if that is an activated LoRA."""
        wants = message.return_logprob
        activation = 0 if invocation_tokens is None else last_occurrence(message.input_ids, invocation_tokens)
        start = message.logprob_start_len
        return cls(
            rid=message.rid,
            prompt_ids=message.input_ids,
            params=message.sampling,
            adapters=() if activation is None else tuple(sorted(message.adapters)),
            activation=activation or 0,
            seed=seed,
            order=order,
            arrival=arrival,
            top_logprobs=message.top_logprobs_num if wants else -1,
            prompt_logprobs_from=start if wants and 0 <= start < len(message.input_ids) else None,
        )

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def remaining(self) -> int:
        """Tokens not yet planned, those in flight included: 1 means plain decoding."""
        return self.num_tokens + self.in_flight - self.num_scheduled

    @property
    def decoding(self) -> bool:
        return self.remaining == 1 and self.num_scheduled >= len(self.prompt_ids)

    def decoding_chunk(self, start: int) -> bool:
        """Whether a chunk that begins at `start` was plain decoding."""
        return start >= len(self.prompt_ids)

    @property
    def max_new_tokens(self) -> int:
        assert self.params.max_new_tokens is not None, "the engine fills it in at the door"
        return self.params.max_new_tokens

    @property
    def needs_token(self) -> bool:
        """A token is in flight that the host must see before it can mask or penalise the logits of the next."""
        return self.in_flight > 0 and (self.grammar is not None or self.edits is not None)

    @property
    def at_limit(self) -> bool:
        """Whether the tokens in flight already exhaust `max_new_tokens`."""
        return len(self.output_ids) + self.in_flight >= self.max_new_tokens

    @property
    def samples(self) -> bool:
        return self.max_new_tokens > 0

    def tokens(self) -> list[int]:
        return self.prompt_ids + self.output_ids

    @cached_property
    def versions(self) -> tuple[int, ...]:
        return tuple([version for version, _ in self.adapters])

    @cached_property
    def weights(self) -> tuple[float, ...]:
        return tuple([weight for _, weight in self.adapters])

    @property
    def most_tokens(self) -> int:
        """When it has ended, at most."""
        return len(self.prompt_ids) + max(1, self.max_new_tokens)

    def prompt_logprob_positions(self, start: int, count: int) -> range:
        """Positions of [start, start + count) whose logits give a prompt logprob that is still missing.

        The logits at position p say how likely the prompt's token p + 1 was; the first token has no logprob.
        """
        if self.prompt_logprobs_from is None:
            return range(0)
        return range(max(start, self.logprob_position), min(start + count, len(self.prompt_ids) - 1))

    @property
    def logprob_position(self) -> int:
        """The prompt position whose logits give the first prompt logprob that is still missing."""
        assert self.prompt_logprobs_from is not None
        return max(self.prompt_logprobs_from, 1) - 1 + len(self.prompt_logprobs)

    @property
    def match_limit(self) -> int:
        """Tokens that may come from the prefix cache: the last one's logits are needed, and the prompt logprobs'."""
        limit = self.num_tokens - 1
        if self.prompt_logprobs_from is not None and self.logprob_position < len(self.prompt_ids) - 1:
            limit = min(limit, self.logprob_position)
        return limit

    def accept(self, token: int, eos_token_ids: tuple[int, ...]) -> Finished | None:
        """Append a sampled token. Returns how the request ends, if it does."""
        self.output_ids.append(token)
        params = self.params
        if not params.ignore_eos and token in eos_token_ids:
            return Finished(type="stop", matched=token)
        if token in (params.stop_token_ids or ()):
            return Finished(type="stop", matched=token)
        if len(self.output_ids) >= self.max_new_tokens:
            return Finished(type="length")
        return None


def last_occurrence(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted`, one token or more, begins for the last time in `tokens`."""
    first, wanted = wanted[0], list(wanted)
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start] == first and tokens[start : start + len(wanted)] == wanted:
            return start
    return None
