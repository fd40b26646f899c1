"""An engine without a model: what it generates is a hash of the sequence so far, kept in the pages as KV would be.

So the right answer to every request is known beforehand (`answer`), and any error in page tables, prefix cache,
fences, chunking or adapter places shows up as another token. Used by this package's tests and by anyone who tests
against it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fakes.tiers import PAGE_BYTES, FakeTiers
from multilora.engine.engine import Engine
from multilora.engine.messages import Ready, Stats
from multilora.engine.plan import Chunk, StepPlan, StepResult
from multilora.engine.scheduling.request import Request, RequestState
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.memory.page_table import KVPages
from multilora.params import Composition

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
class _Row:
    """A chunk as it was when it was launched: later changes on the host do not reach the device."""

    chunk: Chunk
    pages: list[int]
    weights: list[tuple[int, torch.Tensor]]  # adapter version, what its place shows


@dataclass(frozen=True)
class FakeLaunched:
    """Stands where `Launched` stands."""

    plan: StepPlan
    result: Callable[[], StepResult]


class FakeRunner:
    """Stands where `Runner` stands. A step computes when its result is asked for, as late as a device could."""

    vocab_size = VOCAB

    def __init__(self, tiers: FakeTiers):
        self._tiers = tiers
        self._page_size = tiers.prefix.page_size
        self._states = [[0] * self._page_size for _ in range(tiers.pool.total)]
        self._sampled: dict[Request, list[int]] = {}  # on the device
        self.rows_wasted = 0  # sampled for requests that had ended

    def launch(self, plan: StepPlan) -> "FakeLaunched":
        rows = [_Row(c, list(c.request.table.pages), self._weights(c)) for c in plan.chunks]
        return FakeLaunched(plan, lambda: self._run(rows))

    def _run(self, rows: list[_Row]) -> StepResult:
        result = StepResult([], [], [], [], [], [])
        for row in rows:
            prompt_logprobs, state = self._compute(row)
            result.prompt_logprobs.append(prompt_logprobs)
            result.prompt_top_logprobs.append([[] for _ in prompt_logprobs])
            if row.chunk.sample:
                self._sample(row.chunk, state, result)
        return result

    def _weights(self, chunk: Chunk) -> list[tuple[int, torch.Tensor]]:
        found = []
        for slot, version in zip(chunk.slots, chunk.request.versions, strict=True):
            site = self._tiers.table.site(slot, 0)
            assert site is not None
            found += [(version, piece.weight) for piece in site.a + site.b[0].pieces]
        return found

    def _compute(self, row: _Row) -> tuple[list[float | None], int]:
        chunk, request = row.chunk, row.chunk.request
        for version, weight in row.weights:
            assert bool((weight == version).all()), f"{request.rid}: not the weights of version {version}"
        adapters = tuple(zip(request.versions, chunk.weights, strict=True))
        tokens = request.prompt_ids + self._sampled.setdefault(request, [])
        logprobs: list[float | None] = []
        state = self._read(row.pages, chunk.start - 1) if chunk.start else 0
        for position in range(chunk.start, chunk.start + chunk.count):
            acts = position >= chunk.start + chunk.pre_activation
            state = after(state, tokens[position], adapters if acts else ())
            self._write(row.pages, position, state)
            if position in chunk.logprob_positions:
                logprobs.append(prompt_logprob(state, request.prompt_ids[position + 1]))
        return logprobs, state

    def _sample(self, chunk: Chunk, state: int, result: StepResult) -> None:
        request = chunk.request
        sampled = self._sampled[request]
        assert len(request.prompt_ids) + len(sampled) == chunk.start + chunk.count, "a token was sampled twice"
        sampled.append(token_of(state))
        self.rows_wasted += request.state is RequestState.FINISHED
        result.token_ids.append(sampled[-1])
        result.logprobs.append(None)
        result.top_logprobs.append(None)
        result.errors.append(None)

    def _read(self, pages: list[int], position: int) -> int:
        """Attention would read all pages up to here, so all must still hold KV."""
        used = pages[: position // self._page_size + 1]
        assert bool((self._tiers.arena[used, 0] == HOLDS_KV).all()), "an adapter was copied over KV still in use"
        return self._states[used[-1]][position % self._page_size]

    def _write(self, pages: list[int], position: int, state: int) -> None:
        page = pages[position // self._page_size]
        self._tiers.arena[page] = HOLDS_KV
        self._states[page][position % self._page_size] = state


def make_engine(
    tiers: FakeTiers,
    *,
    ahead: bool = False,
    max_queued: int = 1000,
    scheduler: type[Scheduler] = Scheduler,
    max_running: int = 8,
    chunk_tokens: int = 16,
    **options: Any,
) -> Engine:
    """The real engine, scheduler and tiers over the fakes. options: of the scheduler."""
    kv = KVPages(tiers.pool, tiers.prefix, tiers.reclaimer, PAGE_BYTES)
    return Engine(
        scheduler(
            kv,
            tiers.store,
            tiers.namespaces,
            eos_token_ids=(EOS,),
            max_running=max_running,
            chunk_tokens=chunk_tokens,
            **options,
        ),
        FakeRunner(tiers),  # type: ignore[arg-type]
        tiers.store,
        describe=_no_ready,
        max_queued=max_queued,
        random_seed=0,
        device=torch.device("cpu"),
        ahead=int(ahead),
    )


def _no_ready(stats: Stats) -> Ready:
    raise NotImplementedError("nobody asks an engine without a model what it can do")
