"""The policy `fair`: virtual token counters per tenant and, within a tenant, per adapter (see `virtual_counters.py`).

The tenant that has received least starts next, with its adapter that has received least, with that one's oldest
request. What is received: new prompt tokens that are computed and tokens that are sampled, each times its weight. A
cached prefix costs nothing, nor does what has to be computed again after a preemption.

Nobody waits for ever: while the oldest request of all has waited over `MAX_AGE`, it is the first to start after every
`AGED_TURN` others. Nothing is reserved: a tenant that is alone gets everything.
"""

import bisect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

from multilora.engine.scheduling.request import Request, by_age
from multilora.engine.scheduling.virtual_counters import Competitor, Counters, in_turn
from multilora.params import Composition

MAX_AGE = 60.0  # seconds
AGED_TURN = 8
OUTRANKED = 2
MOST_OWED = 20_000.0
"""Weighted tokens that a tenant may be behind the least served one for what it got elsewhere: some seconds' worth."""
PATIENCE = 1.0  # seconds that the first one waits for an adapter before others have to make room
LOOK_AT = 512  # requests in one plan: with thousands waiting, even looking at them counts
HEAD = 16  # requests that the window holds
REFRESH = 16  # plans for which the window stays as it is at most


@dataclass(frozen=True)
class FairWeights:
    """What a token costs, and the tenants whose share is not 1. All are positive."""

    input: float = 1.0
    output: float = 2.0
    tenants: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


EQUAL = FairWeights()


class _Adapters(Competitor):
    """One composition of adapters of a tenant. queue: its waiting requests, by priority and age."""

    __slots__ = ("queue",)

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Request] = []


class _Tenant(Competitor):
    """waiting, running: requests; queued_tokens: of the prompts that wait; served: weighted tokens that nobody has
    asked for yet."""

    __slots__ = ("adapters", "queued_tokens", "running", "served", "waiting")

    def __init__(self, weight: float):
        super().__init__(weight)
        self.adapters: Counters[Composition, _Adapters] = Counters(lambda _: _Adapters())
        self.waiting = 0
        self.running = 0
        self.queued_tokens = 0
        self.served = 0.0


@dataclass(slots=True)
class _Account:
    """Who pays for a request. prompt: its tokens; charged: tokens of prompt and answer that are paid."""

    tenant: _Tenant
    adapters: _Adapters
    prompt: int
    charged: int = 0
    runs: bool = False


class FairShare:
    """Who is preempted is the youngest of the tenant that has received most. The first two arguments are those of
    every policy; it needs neither."""

    groups = False
    heeds_priority = True

    def __init__(self, matched: Callable[[Request], int], max_wait: float = PATIENCE, weights: FairWeights = EQUAL):
        del matched, max_wait
        self._weights = weights
        self._tenants: Counters[str, _Tenant] = Counters(lambda name: _Tenant(weights.tenants.get(name, 1.0)))
        self._accounts: dict[Request, _Account] = {}  # of all unfinished requests
        self._first_since: dict[Request, float] = {}  # when it was first found to be the first
        self._aged: Request | None = None  # goes first for its age
        self._starts = 0  # since the last one that went first for its age
        self._window: list[Request] = []
        self._rest: Generator[Request, None, None] | None = None  # what follows the window, while that is up to date
        self._plans = REFRESH  # since the window was made anew

    # ------------------------------------------------------------------ the queue

    def enqueue(self, request: Request) -> None:
        """It waits from now on: it is new, or was preempted."""
        self._close()
        self._plans = REFRESH
        account = self._accounts.get(request) or self._open(request)
        tenant, adapters = account.tenant, account.adapters
        self._stopped(account)
        bisect.insort(adapters.queue, request, key=_turn)
        tenant.waiting += 1
        tenant.queued_tokens += account.prompt
        tenant.adapters.enter(adapters)
        self._tenants.enter(tenant)

    def dequeue(self, request: Request) -> None:
        """It starts or ends."""
        account = self._accounts[request]
        tenant, adapters = account.tenant, account.adapters
        del adapters.queue[bisect.bisect_left(adapters.queue, _turn(request), key=_turn)]
        tenant.waiting -= 1
        tenant.running += 1
        account.runs = True
        tenant.queued_tokens -= account.prompt
        if not adapters.queue:
            tenant.adapters.leave(adapters)
        if not tenant.waiting:
            self._tenants.leave(tenant)
        self._first_since.pop(request, None)
        self._starts = 0 if request is self._aged else self._starts + 1
        self._close()
        if request in self._window:
            self._window.remove(request)

    def forget(self, request: Request) -> None:
        """It has ended."""
        account = self._accounts.pop(request)
        self._stopped(account)
        account.tenant.adapters.release(account.adapters)
        self._tenants.release(account.tenant)

    def queued_before(self, tenant: str, queued_tokens: int) -> int:
        """At least so many prompt tokens go before those of a new request of the tenant: its own."""
        del queued_tokens
        found = self._tenants.get(tenant)
        return 0 if found is None else found.queued_tokens

    # ------------------------------------------------------------------ who starts

    def window(self, waiting: Sequence[Request], now: float, *, starting: bool) -> Sequence[Request]:
        """The first `HEAD` in order. While nothing can start, those that were it last, unless somebody has come."""
        self._plans += 1
        if self._plans > REFRESH or not self._window or (starting and self._rest is None):
            self._close()
            self._rest = self._in_order(waiting[0], now)
            self._window = list(islice(self._rest, HEAD))
            self._plans = 0
        self._first_since.setdefault(self._window[0], now)
        return self._window

    def order(self, window: Sequence[Request]) -> Iterable[Request]:
        """The window, and then others, `LOOK_AT` in all."""
        yield from list(window)
        rest, self._rest = self._rest, None
        if rest is not None:
            yield from islice(rest, LOOK_AT - len(window))

    def overdue(self, request: Request, now: float) -> bool:
        """Whether it has been the first for long."""
        return now - self._first_since.get(request, now) > PATIENCE

    def _in_order(self, oldest: Request, now: float) -> Generator[Request, None, None]:
        by_age = self._starts >= AGED_TURN and now - oldest.spec.arrival > MAX_AGE
        self._aged = oldest if by_age else None
        if by_age:
            yield oldest
        for request, _ in in_turn(self._tenants, self._of_tenant):
            if not by_age or request is not oldest:
                yield request

    def _of_tenant(self, tenant: _Tenant) -> Iterator[tuple[Request, float]]:
        only = tenant.adapters.only
        return in_turn(tenant.adapters, self._of_adapters) if only is None else self._of_adapters(only)

    def _of_adapters(self, adapters: _Adapters) -> Iterator[tuple[Request, float]]:
        queue, i = adapters.queue, 0
        while i < len(queue):
            request = queue[i]
            account = self._accounts[request]
            unread = max(0, account.prompt - account.charged)
            yield request, self._weights.input * unread + self._weights.output
            if i < len(queue) and queue[i] is request:  # else it has left, and the next one stands here
                i += 1

    # ------------------------------------------------------------------ who runs

    def charge(self, request: Request, tokens: int) -> None:
        """How many of the `tokens` tokens before `num_scheduled` were never charged for."""
        account, end = self._accounts[request], request.progress.num_scheduled
        start, prompt = account.charged, account.prompt
        if tokens == 1 and start == end - 1 and start >= prompt:  # most of the time: one more sampled token
            service = self._weights.output
        else:
            start = max(start, end - tokens)
            if end <= start:
                return
            sampled = end - max(start, prompt - 1)  # the last token of the prompt brings the first one
            service = self._weights.output * max(0, sampled) + self._weights.input * max(0, min(end, prompt) - start)
        account.charged = end
        account.tenant.counter += service / account.tenant.weight
        account.tenant.served += service
        account.adapters.counter += service

    def charge_elsewhere(self, served: Mapping[str, float]) -> None:
        """Who has been served by other engines goes behind those who have not, here too: by `MOST_OWED` at most, as
        nobody may have lacked what was served there."""
        most = self._tenants.least() + MOST_OWED
        for name, service in served.items():
            tenant = self._tenants.hold(name)
            charged = min(tenant.counter + service / tenant.weight, most)
            tenant.counter = max(tenant.counter, charged)
            self._tenants.release(tenant)

    def take_served(self) -> dict[str, float]:
        """Weighted tokens by tenant, since the last call."""
        found = {name: tenant.served for name, tenant in self._tenants.items() if tenant.served}
        for name in found:
            tenant = self._tenants.get(name)
            assert tenant is not None
            tenant.served = 0.0
        return found

    def prefills(self, running: Sequence[Request]) -> Sequence[Request]:
        """Running prompts in the order in which they get a step's tokens."""
        return running if len(running) < 2 else sorted(running, key=lambda r: self._accounts[r].tenant.counter)

    def yields(self, running: Request) -> bool:
        """Whether a tenant that waits has received less than the one of this running prompt."""
        self._close()
        first = self._tenants.first()
        return first is not None and first.counter < self._accounts[running].tenant.counter

    def outranked(self, waiting: Request, running: Sequence[Request]) -> Request | None:
        """The victim, if its tenant has received more and has over `OUTRANKED` times as many slots for its weight."""
        victim = self.victim(running)
        less, more = self._accounts[waiting].tenant, self._accounts[victim].tenant
        slots, others = (less.running + 1) / less.weight, more.running / more.weight
        return victim if less.counter < more.counter and others > OUTRANKED * slots else None

    def victim(self, running: Sequence[Request]) -> Request:
        oldest = min(running, key=by_age)
        others = (r for r in running if r is not oldest)
        return max(others, key=lambda r: (self._accounts[r].tenant.counter, r.spec.order), default=oldest)

    # ------------------------------------------------------------------ inside

    def _open(self, request: Request) -> _Account:
        tenant = self._tenants.hold(request.spec.tenant)
        adapters = tenant.adapters.hold(request.spec.adapters)
        account = self._accounts[request] = _Account(tenant, adapters, len(request.spec.prompt_ids))
        return account

    def _stopped(self, account: _Account) -> None:
        account.tenant.running -= account.runs
        account.runs = False

    def _close(self) -> None:
        """Nobody is in the middle of an order: the counters may change hands."""
        if self._rest is not None:
            self._rest.close()
            self._rest = None


def _turn(request: Request) -> tuple[int, int]:
    """Sort key within a tenant's adapters."""
    return request.spec.priority, request.spec.order
