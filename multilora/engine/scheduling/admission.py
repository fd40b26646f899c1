"""Which waiting requests start in a step. Owns no queue and no memory: it looks, and has adapters brought in.

- In the policy's order, but a request whose adapter is there goes before one whose adapter is not.
- No adapter is evicted while one of the policy's window will ask for it, until the first one is overdue. Then nothing
  starts on the adapters that are nearest to idle any more, so that a place becomes free for it.
- Where adapters have to take turns, requests of the same adapter follow each other, if the policy lets them.
- A prompt step costs much whatever its number of tokens. So when other adapters are a moment away, those that are
  ready wait for them, if all together lose less by it than by a second step (DESIGN §4).

Called by `scheduler.py`, once a plan.
"""

from collections.abc import Callable, Sequence

from multilora.adapters.lifecycle.components import Components
from multilora.adapters.lifecycle.store import LoadStatus
from multilora.engine.plan import Chunk
from multilora.engine.scheduling.policy import Policy
from multilora.engine.scheduling.request import Request, RequestState
from multilora.engine.scheduling.step_cost import StepCost

MOST_FREED = 4  # slots, in one plan, by preempting others
BRING_IN = 32  # the first so many have their adapters brought in before there is room to run them


class Admission:
    """want: asks for a request's adapters, urgently or not. clock: monotonic seconds, as `RequestSpec.arrival`."""

    def __init__(
        self,
        policy: Policy,
        components: Components,
        cost: StepCost,
        *,
        want: Callable[[Request, bool], LoadStatus],
        clock: Callable[[], float],
    ):
        self._policy = policy
        self._components = components
        self._cost = cost
        self._want = want
        self._clock = clock
        self._holding_since: float | None = None

    def choose(self, waiting: Sequence[Request], planned: Sequence[Chunk], slots: int, budget: int) -> list[Request]:
        """Requests to start now, in order; all are ready. waiting: by arrival; planned: what the step holds already;
        slots, budget: requests and tokens that it can still take."""
        full = slots <= 0 or budget <= 0
        window = self._policy.window(waiting, now := self._clock(), starting=not full)
        self._demand(window)
        first, overdue = window[0], self._policy.overdue(window[0], now)
        bring_in = min(BRING_IN, len(window))
        ready: list[Request] = []
        coming: list[Request] = []
        blocked: Request | None = None
        draining: set[int] = set()
        for i, request in enumerate(window[:BRING_IN] if full else self._policy.order(window)):
            if i >= bring_in and len(ready) >= slots and (blocked is None or not self._policy.groups):
                break
            if i >= len(window):
                self._demand((request,))
            if request.progress.in_flight:  # preempted while its token was being sampled: wait for that
                continue
            if self._components.ready(request.versions):
                if draining.isdisjoint(request.versions):
                    ready.append(request)
            elif blocked is None and (i < bring_in or len(ready) < slots):
                found = self._want(request, overdue and request is first)
                blocked = request if found is LoadStatus.BLOCKED else None
                (ready if found is LoadStatus.READY else coming).append(request)
                if blocked is first and overdue:
                    draining = self._components.nearest_to_idle(request.versions)
        if full:
            return []
        if blocked is not None and not ready and not planned and blocked.state is RequestState.WAITING:
            self._want(blocked, True)  # nothing will make room but this
        if blocked is not None and self._policy.groups:
            ready = _grouped(ready)
        return [] if self._holds(ready[:slots], coming, planned, slots, budget) else ready[:slots]

    def _demand(self, requests: Sequence[Request]) -> None:
        """Their adapters stay for them, if possible."""
        for request in requests:
            if not request.queued_demand:
                request.queued_demand = True
                self._components.count_demand(request.versions, 1)

    def _holds(
        self, ready: list[Request], coming: list[Request], planned: Sequence[Chunk], slots: int, budget: int
    ) -> bool:
        """Whether the ready requests should wait for others: never longer than a second step would take."""
        if not ready or not coming or any(not c.decodes for c in planned):
            self._holding_since = None
            return False
        now = self._clock()
        begun = now if self._holding_since is None else self._holding_since
        arrivals = self._arrivals(coming, slots - len(ready), budget - sum(r.progress.remaining for r in ready))
        meanwhile = self._cost.decode if planned else 0.0
        holds = now - begun < self._cost.fixed and self._gain(len(ready), arrivals, meanwhile) > 0
        self._holding_since = begun if holds else None
        return holds

    def _arrivals(self, coming: list[Request], slots: int, budget: int) -> list[tuple[float, int]]:
        """(seconds until it is ready, prompt tokens) of the requests that could join the same step, soonest first."""
        soon = [
            (s, r.progress.remaining) for r in coming if (s := self._components.seconds_left(r.versions)) is not None
        ]
        fitting = []
        for seconds, tokens in sorted(soon)[: max(0, slots)]:
            budget -= tokens
            if budget < 0:
                break
            fitting.append((seconds, tokens))
        return fitting

    def _gain(self, ready: int, arrivals: list[tuple[float, int]], meanwhile: float) -> float:
        """Seconds that all requests together win at best, if the step waits for the first few arrivals.

        If it does not, those arrivals sit through the fixed cost of a step that runs without them, instead of what is
        left of the wait. If it does, those that are ready lose the wait and the time of the others' prompts.
        meanwhile: what a step without prompts takes, if there is one to run: waiting ends with it at the earliest.
        """
        best, tokens = 0.0, 0
        for count, (seconds, more) in enumerate(arrivals, start=1):
            tokens += more
            wait = max(seconds, meanwhile)
            lost = ready * (wait + self._cost.per_token * tokens)
            best = max(best, count * (self._cost.fixed - wait) - lost)
        return best


def _grouped(requests: list[Request]) -> list[Request]:
    """Requests of one adapter follow its first one, so that the adapter is idle again soon."""
    first: dict[object, int] = {}
    for i, request in enumerate(requests):
        first.setdefault(request.spec.adapters or request, i)
    return sorted(requests, key=lambda r: first[r.spec.adapters or r])
