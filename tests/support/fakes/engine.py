"""An engine without a model: what it generates is a hash of the sequence so far, kept in the pages as KV would be.

So the right answer to every request is known beforehand (`answer`), and any error in page tables, prefix cache,
fences, chunking or adapter places shows up as another token. Used by this package's tests and by anyone who tests
against it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fakes.tiers import PAGE_BYTES, TARGET, FakeTiers
from multilora.engine.engine import Engine
from multilora.engine.messages import Logprobs, Ready, Stats
from multilora.engine.plan import Chunk, LoraInstall, StepPlan, StepResult
from multilora.engine.ranks.lead import NoRanks
from multilora.engine.sampling.state import SamplingState
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.lora.table import LoraTable
from multilora.memory.page_table import KVPages
from multilora.params import Composition, SamplingParams

VOCAB = 23
EOS = 2
HOLDS_KV = 0xCC  # what the first byte of a page says once it holds KV


def only(version: int | None) -> Composition:
    """One adapter, plainly; None: the base model."""
    return () if version is None else ((version, 1.0),)


def after(state: int, token: int, adapters: Composition) -> int:
    """The state that follows when `token` comes; 0 is the state of the empty sequence. The order of adapters is
    without meaning."""
    mixed = (state ^ (token + 1) * 0x9E3779B97F4A7C15) + 1
    for version, weight in adapters:
        numerator, denominator = weight.as_integer_ratio()
        mixed ^= (version + 1) * 0xBF58476D1CE4E5B9 + numerator * 0x2545F4914F6CDD1D * denominator
    return (mixed * 0x94D049BB133111EB >> 7) & ((1 << 61) - 1)


def token_of(state: int) -> int:
    return (state >> 20) % VOCAB


def prompt_logprob(state: int, token: int) -> float:
    """Of `token`, which follows a prompt that has led to `state`."""
    return -float((state ^ token) % 1009)


@dataclass(frozen=True)
class Answer:
    """What a request must get: tokens, how it ends, and the logprobs of prompt tokens 1, 2, …"""

    tokens: list[int]
    finish: str  # "stop" or "length"
    prompt_logprobs: list[float]


def answer(
    prompt: Sequence[int], adapters: Composition, max_new_tokens: int, ignore_eos: bool = False, activation: int = 0
) -> Answer:
    """activation: the adapters act from this position on."""
    state, logprobs = 0, []
    for i, token in enumerate(prompt):
        if i:
            logprobs.append(prompt_logprob(state, token))
        state = after(state, token, adapters if i >= activation else ())
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        tokens.append(token_of(state))
        if tokens[-1] == EOS and not ignore_eos:
            return Answer(tokens, "stop", logprobs)
        state = after(state, tokens[-1], adapters)
    return Answer(tokens, "length", logprobs)


@dataclass
class _Sequence:
    """What the device knows of the request at one slot."""

    state: SamplingState
    sampled: dict[int, int] = field(default_factory=dict)  # position → token
    pages: list[int] = field(default_factory=list)
    drafted: bool = False  # ever


@dataclass
class _Row:
    """A chunk as it was when it was launched: later changes on the host do not reach the device."""

    chunk: Chunk
    sequence: _Sequence
    pages: list[int]
    weights: list[tuple[int, torch.Tensor]]  # of each adapter: version, what its place shows


@dataclass(frozen=True)
class FakeForward:
    """Stands where `Forward` stands."""

    plan: StepPlan
    rows: list[_Row]


@dataclass(frozen=True)
class FakeLaunched:
    """Stands where `Launched` stands."""

    plan: StepPlan
    result: Callable[[], StepResult]


class FakeRunner:
    """Stands where `Runner` stands: knows nothing but plans. A step computes when its result is asked for, as late as
    a device could.

    unread: numbers of the steps that were sampled and not read; tokens_sampled: of all requests, wasted ones too.
    """

    vocab_size = VOCAB

    def __init__(self, tiers: FakeTiers):
        self._arena = tiers.arena
        self._table = LoraTable(tiers.arena, TARGET.dtype, ((0,),))
        self._page_size, self._groups, self._columns = (
            tiers.prefix.page_size,
            tiers.prefix.groups,
            tiers.prefix.columns,
        )
        self._states = [[0] * self._page_size for _ in range(tiers.pool.total)]
        self._sequences: dict[int, _Sequence] = {}  # slot → sequence
        self._last_step = 0
        self.sound = True
        self.unread: list[int] = []
        self.tokens_sampled = 0

    def grammar_ready(self, grammar: str) -> bool:
        return True

    def check_sampling(self, params: SamplingParams, vocab_size: int, grammar: str | None) -> None:
        """Everything goes."""

    def is_sound(self, error: Exception) -> bool:
        return self.sound

    def forward(self, plan: StepPlan) -> FakeForward:
        assert plan.number == self._last_step, "it has been applied"
        rows = []
        for chunk in plan.chunks:
            sequence = self._sequences[chunk.slot]
            rows.append(_Row(chunk, sequence, list(sequence.pages), self._weights(chunk)))
        return FakeForward(plan, rows)

    def needs_tokens(self, plan: StepPlan) -> bool:
        return any(self._sequences[slot].state.grammar is not None for slot in plan.sampling_slots)

    def sample(self, forward: FakeForward) -> FakeLaunched:
        number = forward.plan.number
        assert not self.unread or not self.needs_tokens(forward.plan), "a grammar has not heard of its last token"
        self.unread.append(number)
        return FakeLaunched(forward.plan, lambda: self._run(number, forward.rows))

    def apply(self, plan: StepPlan) -> None:
        assert plan == StepPlan.decode(plan.encode()), "a plan must survive its way to another rank"
        assert plan.number == self._last_step + 1, "steps are executed in order, each of them"
        self._last_step = plan.number
        for slot in plan.free:
            self._sequences.pop(slot, None)
        for state in plan.install:
            assert state.slot not in self._sequences, "the slot is in use"
            self._sequences[state.slot] = _Sequence(state)
        for update in plan.pages:
            pages = self._sequences[update.slot].pages
            assert update.first <= len(pages), "pages are missing"
            pages[update.first :] = update.pages
        for change in plan.lora:
            if isinstance(change, LoraInstall):
                self._table.install(change.slot, TARGET.layout(change.shape), change.pages)
            else:
                self._table.remove(change.slot)

    def _run(self, number: int, rows: list[_Row]) -> StepResult:
        assert self.unread.pop(0) == number, "steps are read in order"
        result = StepResult([], [], [], [])
        for row in rows:
            prompt_logprobs, states = self._compute(row)
            result.prompt_logprobs.append(prompt_logprobs)
            wanted = row.chunk.answer_positions
            for position, state in zip(wanted, states[len(states) - len(wanted) :], strict=True):
                self._sample(row, position, state, result)
        return result

    def _weights(self, chunk: Chunk) -> list[tuple[int, torch.Tensor]]:
        found = []
        for slot in chunk.lora_slots:
            site = self._table.site(slot, 0)
            assert site is not None
            pieces = [piece.weight for piece in site.a + site.b[0].pieces]
            version = int(pieces[0].flatten()[0])
            found += [(version, weight) for weight in pieces]
        return found

    def _compute(self, row: _Row) -> tuple[list[Logprobs], list[int]]:
        """The prompt logprobs, and the state after each token."""
        chunk, sequence = row.chunk, row.sequence
        for version, weight in row.weights:
            assert bool((weight == version).all()), f"slot {chunk.slot}: not the weights of version {version}"
        versions = list(dict.fromkeys(version for version, _ in row.weights))
        adapters = tuple(zip(versions, chunk.lora_weights, strict=True))
        end = chunk.start + chunk.count
        tokens = chunk.token_ids or [sequence.sampled[chunk.start]]
        assert len(tokens) == chunk.count
        known = chunk.count - max(0, len(chunk.answer_positions) - 1)  # a draft follows
        for position, token in enumerate(tokens[:known], chunk.start):
            assert sequence.sampled.get(position, token) == token, "not the token that was sampled here"
        wanted = iter(chunk.prompt_logprobs.next_ids if chunk.prompt_logprobs else ())
        first = chunk.prompt_logprobs.first if chunk.prompt_logprobs else end
        logprobs, states = [], []
        state = self._read(row.pages, chunk.start) if chunk.start else 0
        for position, token in enumerate(tokens, chunk.start):
            acts = position >= chunk.start + chunk.pre_activation
            state = after(state, token, adapters if acts else ())
            states.append(state)
            self._write(row.pages, position, state)
            if position >= first and (next_id := next(wanted, None)) is not None:
                logprobs.append(Logprobs(prompt_logprob(state, next_id)))
        return logprobs, states

    def _sample(self, row: _Row, position: int, state: int, result: StepResult) -> None:
        """Behind a draft, what is sampled counts as far as it was foreseen."""
        chunk, sequence, token = row.chunk, row.sequence, token_of(state)
        i = position - chunk.answer_positions[0]
        end = chunk.start + chunk.count - len(chunk.answer_positions) + 1 + i
        if i == 0 and sequence.drafted:  # what a draft brought may have been given up, with the pages
            sequence.sampled = {at: known for at, known in sequence.sampled.items() if at < end}
        if i == 0 or sequence.sampled.get(end - 1) == chunk.token_ids[i]:
            assert end not in sequence.sampled, "a token was sampled twice"
            assert position == len(sequence.sampled), "not the next token of the answer"
            sequence.sampled[end] = token
        sequence.drafted |= len(chunk.answer_positions) > 1
        self.tokens_sampled += 1
        result.token_ids.append(token)
        result.logprobs.append(None)
        result.errors.append(None)

    def _read(self, pages: list[int], position: int) -> int:
        """The state before `position`. Attention would read all that the token there sees, so all of it must still
        hold KV, in every layer that of the same tokens."""
        size, first = self._page_size, 0
        seen: dict[int, int] = {}  # position → state, as the columns before have it
        for group in self._groups:
            start = 0 if group.window is None else max(0, position + 1 - group.window)
            for column in range(first, first + group.columns):
                blocks = range(start // size, (position - 1) // size + 1)
                read = [pages[block * self._columns + column] for block in blocks]
                assert min(read) >= 0, "a page that is still read has been given back"
                assert bool((self._arena[read, 0] == HOLDS_KV).all()), "an adapter was copied over KV still in use"
                for p in range(start if self._columns > 1 else position, position):
                    state = self._states[pages[p // size * self._columns + column]][p % size]
                    assert seen.setdefault(p, state) == state, "layers hold the KV of different tokens"
            first += group.columns
        return self._states[pages[(position - 1) // size * self._columns]][(position - 1) % size]

    def _write(self, pages: list[int], position: int, state: int) -> None:
        first = position // self._page_size * self._columns
        for page in pages[first : first + self._columns]:
            self._arena[page] = HOLDS_KV
            self._states[page][position % self._page_size] = state


def make_engine(
    tiers: FakeTiers,
    *,
    ahead: bool = False,
    max_unfinished: int = 1000,
    max_queued_tokens: int | None = None,
    scheduler: type[Scheduler] = Scheduler,
    max_running: int = 8,
    chunk_tokens: int = 16,
    **options: Any,
) -> Engine:
    """The real engine, scheduler and tiers over the fakes. options: of the scheduler."""
    kv = KVPages(tiers.pool, tiers.prefix, tiers.reclaimer, PAGE_BYTES, 2 * chunk_tokens)
    return Engine(
        scheduler(
            kv,
            tiers.store,
            tiers.namespaces,
            tiers.journal,
            eos_token_ids=(EOS,),
            max_running=max_running,
            chunk_tokens=chunk_tokens,
            **options,
        ),
        FakeRunner(tiers),  # type: ignore[arg-type]
        tiers.store,
        NoRanks(),
        describe=_no_ready,
        max_unfinished=max_unfinished,
        max_queued_tokens=max_queued_tokens,
        random_seed=0,
        ahead=int(ahead),
    )


def rids_of(engine: Engine, plan: StepPlan) -> list[str]:
    """Whose chunks these are. The plan has been made and not been committed yet."""
    return [request.rid for request, _ in engine.scheduler.steps[plan.number].runs]


def _no_ready(stats: Stats) -> Ready:
    raise NotImplementedError("nobody asks an engine without a model what it can do")
