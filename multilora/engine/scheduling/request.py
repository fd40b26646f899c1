"""One object per request: what the client asked for, how far it has come, and what it holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

from multilora.engine.messages import Finished, Logprobs, Submit
from multilora.engine.sampling.state import needs_counts
from multilora.engine.scheduling.page_namespaces import PageNamespaces
from multilora.memory.page_table import PageTable
from multilora.params import Composition, LogprobsMode, PoolingParams, SamplingParams


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """What the client asked for. Never changes, but for the version of an adapter that is replaced meanwhile.

    order: rises with arrival. adapters: act on the tokens from position `activation` on, which are all but with
    activated LoRA; their versions ascend. top_logprobs, of output tokens: -1 none, 0 the chosen token's, k also the k
    best, with ranks if return_ranks. prompt_logprobs_from: first prompt position whose logprob is wanted, together
    with the prompt_top best tokens and, if prompt_ranks, its rank. arrival, deadline: monotonic seconds.
    """

    rid: str
    prompt_ids: list[int]
    params: SamplingParams
    adapters: Composition
    activation: int
    seed: int
    order: int
    arrival: float
    vocab_size: int
    top_logprobs: int
    return_ranks: bool
    logprobs_mode: LogprobsMode
    prompt_logprobs_from: int | None
    prompt_top: int
    prompt_ranks: bool
    pooling: PoolingParams | None
    salt: str
    grammar: str | None
    tenant: str
    priority: int
    deadline: float | None

    @classmethod
    def of(
        cls,
        message: Submit,
        invocation_tokens: tuple[int, ...] | None,
        *,
        seed: int,
        order: int,
        arrival: float,
        vocab_size: int,
    ) -> "RequestSpec":
        """invocation_tokens: of its one adapter, if that is an activated LoRA."""
        wants = message.return_logprob
        activation = 0 if invocation_tokens is None else last_occurrence(message.input_ids, invocation_tokens)
        start = message.logprob_start_len if wants else -1
        of_prompt = message.prompt_logprobs
        if of_prompt is not None:
            start = 0
        return cls(
            rid=message.rid,
            prompt_ids=message.input_ids,
            params=message.sampling,
            adapters=() if activation is None else tuple(sorted(message.adapters)),
            activation=activation or 0,
            seed=seed,
            order=order,
            arrival=arrival,
            vocab_size=vocab_size,
            top_logprobs=message.top_logprobs_num if wants else -1,
            return_ranks=message.return_ranks,
            logprobs_mode=message.logprobs_mode,
            prompt_logprobs_from=start if 0 <= start < len(message.input_ids) else None,
            prompt_top=max(of_prompt or 0, message.top_logprobs_num if wants else 0),
            prompt_ranks=of_prompt is not None,
            pooling=message.pooling,
            salt=message.salt,
            grammar=message.grammar,
            tenant=message.tenant,
            priority=message.priority,
            deadline=message.deadline,
        )

    def with_successor(self, version: int, successor: int) -> "RequestSpec":
        """The same request, on `successor` instead of `version`."""
        adapters = [(successor if one == version else one, weight) for one, weight in self.adapters]
        return replace(self, adapters=tuple(sorted(adapters)))

    @cached_property
    def versions(self) -> tuple[int, ...]:
        return tuple([version for version, _ in self.adapters])

    @cached_property
    def weights(self) -> tuple[float, ...]:
        return tuple([weight for _, weight in self.adapters])

    @cached_property
    def max_new_tokens(self) -> int:
        assert self.params.max_new_tokens is not None, "the engine fills it in at the door"
        return self.params.max_new_tokens

    @property
    def samples(self) -> bool:
        """Whether tokens are wanted at all; else only the prompt is read."""
        return self.max_new_tokens > 0

    @cached_property
    def can_draft(self) -> bool:
        """Whether tokens may be sampled before those in front of them are known: the sampler keeps no count of them
        (penalties) and follows no grammar."""
        return self.max_new_tokens > 1 and self.grammar is None and not needs_counts(self.params)

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer when it has ended, at most."""
        return len(self.prompt_ids) + max(1, self.max_new_tokens)


@dataclass(slots=True)
class Progress:
    """How far a request has come, in tokens of prompt and answer. drafted: how many of those in flight are guesses
    that are verified; the one before them is the last known token's successor.

    tokens     0 ............ num_computed ........ num_scheduled ........ num_tokens ........ + in_flight
               KV committed   |  launched, KV on its way  |  known, not scheduled |  being sampled, only the device knows
    """  # noqa: E501

    num_prompt: int
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_scheduled: int = 0
    in_flight: int = 0
    drafted: int = 0
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # those that have come

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return self.num_prompt + len(self.output_ids)

    @property
    def remaining(self) -> int:
        """Tokens not yet scheduled, those in flight included: 1 means plain decoding."""
        return self.num_prompt + len(self.output_ids) + self.in_flight - self.num_scheduled

    @property
    def decoding(self) -> bool:
        return self.num_scheduled >= self.num_prompt and self.remaining == 1

    def restart(self, cached: int) -> None:
        """The KV of the first `cached` tokens is in pages, nothing else is. A draft in flight is given up, with all
        that is sampled for it; a token that is sampled without one comes all the same."""
        if self.drafted:
            self.in_flight = self.drafted = 0
        self.num_computed = self.num_scheduled = cached  # |= cached, both marks stand here
        self._check()

    def schedule(self, count: int, sampled: int) -> None:
        """A step with the next `count` tokens goes to the device; it samples `sampled` new ones."""
        self.num_scheduled += count  # num_computed |==== count ====> num_scheduled
        self.in_flight += sampled  # the end moves with it
        self._check()

    def schedule_draft(self, count: int) -> None:
        """A step with the last known token and `count` drafted ones goes to the device; it samples after each."""
        assert self.remaining == 1 and not self.in_flight, self
        self.drafted = count
        self.schedule(1 + count, 1 + count)

    def end_draft(self, right: int) -> None:
        """The draft has been verified. Its first `right` tokens, and the one sampled after them, are still in flight;
        what lies in the pages behind them is void."""
        wrong = self.drafted - right
        self.drafted = 0
        self.in_flight -= wrong
        self.num_scheduled -= wrong  # num_computed .... num_scheduled |<== wrong ==|
        self._check()

    def commit(self, count: int) -> None:
        """The KV of `count` scheduled tokens is in its pages."""
        self.num_computed += count  # num_computed ==== count ====>| at most up to num_scheduled
        self._check()

    def take_token(self, token: int) -> None:
        """The host has learnt a token that was in flight."""
        self.in_flight -= 1
        self.output_ids.append(token)  # num_tokens + in_flight stays where it is
        self._check()

    def _check(self) -> None:
        end = self.num_prompt + len(self.output_ids) + self.in_flight
        assert 0 <= self.num_computed <= self.num_scheduled <= end, self
        assert not self.drafted or self.in_flight == 1 + self.drafted, self


class RequestState(Enum):
    WAITING = "waiting"  # never ran, or preempted: holds no pages and no adapter
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """slot: see `slots.py`; None: it has never run. The runner knows the first `sent_pages` of its pages."""

    spec: RequestSpec
    progress: Progress
    state: RequestState = RequestState.WAITING
    slot: int | None = None
    table: PageTable = field(default_factory=PageTable)
    sent_pages: int = 0
    lora_slots: tuple[int, ...] = ()  # of its adapters, while it runs
    namespaces: PageNamespaces = field(default_factory=PageNamespaces)
    mixed: bool = False  # several versions of an adapter have written its KV: it is never shared
    stalled: bool = False  # it takes no step until the version that it goes on with is resident
    epoch: int = 0  # how often it was preempted
    admitted: float | None = None  # when it first ran
    cached_tokens: int = 0  # of the prompt, when it first ran
    hit_counted: bool = False  # counted as a hit or miss of its adapter
    queued_demand: bool = False  # counted among those that its adapters are kept for
    first_output_sent: bool = False  # an Output has gone out

    @classmethod
    def of(cls, spec: RequestSpec) -> "Request":
        return cls(spec, Progress(len(spec.prompt_ids)))

    @property
    def rid(self) -> str:
        return self.spec.rid

    @property
    def versions(self) -> tuple[int, ...]:
        return self.spec.versions

    @property
    def at_limit(self) -> bool:
        """Whether the tokens in flight already exhaust `max_new_tokens`."""
        return len(self.progress.output_ids) + self.progress.in_flight >= self.spec.max_new_tokens

    @property
    def has_answer(self) -> bool:
        """Whether a token of its answer is known, or being sampled."""
        return bool(self.progress.output_ids or self.progress.in_flight)

    def restart(self) -> None:
        """Back to the queue: it holds no pages any more."""
        self.state = RequestState.WAITING
        self.progress.restart(0)
        self.epoch += 1
        self.mixed = self.stalled = False

    def tokens(self) -> list[int]:
        """All known tokens."""
        return self.spec.prompt_ids + self.progress.output_ids

    def token_ids(self, start: int, count: int) -> list[int]:
        """Tokens [start, start + count); empty if they are not known yet."""
        prompt, output = self.spec.prompt_ids, self.progress.output_ids
        first, end = start - len(prompt), start + count - len(prompt)
        if end > len(output):
            return []
        if end <= 0:
            return prompt[start : start + count]
        return output[first:end] if first >= 0 else prompt[start:] + output[:end]

    def prompt_logprob_positions(self, start: int, count: int) -> range:
        """Positions of [start, start + count) whose logits give a prompt logprob that is still missing.

        The logits at position p say how likely the prompt's token p + 1 was; the first token has no logprob.
        """
        if self.spec.prompt_logprobs_from is None:
            return range(0)
        return range(max(start, self.logprob_position), min(start + count, len(self.spec.prompt_ids) - 1))

    @property
    def logprob_position(self) -> int:
        """The prompt position whose logits give the first prompt logprob that is still missing."""
        assert self.spec.prompt_logprobs_from is not None
        return max(self.spec.prompt_logprobs_from, 1) - 1 + len(self.progress.prompt_logprobs)

    @property
    def match_limit(self) -> int:
        """Tokens that may come from the prefix cache: the last one's logits are needed, and the prompt logprobs'. All
        hidden rows are needed where other rows than the last one are pooled."""
        if self.spec.pooling is not None and self.spec.pooling.method != "last":
            return 0
        limit = self.progress.num_tokens - 1
        if self.spec.prompt_logprobs_from is not None and self.logprob_position < len(self.spec.prompt_ids) - 1:
            limit = min(limit, self.logprob_position)
        return limit

    def ending(self, token: int, index: int, eos_token_ids: tuple[int, ...]) -> Finished | None:
        """How the request ends with `token` at this index of its answer, if it does."""
        params = self.spec.params
        if not params.ignore_eos and token in eos_token_ids:
            return Finished(type="stop", matched=token)
        if token in (params.stop_token_ids or ()):
            return Finished(type="stop", matched=token)
        if index + 1 >= self.spec.max_new_tokens:
            return Finished(type="length")
        return None


def by_age(request: Request) -> int:
    """Sort key: the oldest first."""
    return request.spec.order


def last_occurrence(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted`, one token or more, begins for the last time in `tokens`."""
    first, wanted = wanted[0], list(wanted)
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start] == first and tokens[start : start + len(wanted)] == wanted:
            return start
    return None
