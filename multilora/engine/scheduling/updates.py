"""Adapters that are replaced while requests run on them: every request on the old version goes on with its successor.

    no token yet       it begins anew: nothing of its answer is the old version's
    has tokens         with the first plan for which the successor is resident; until then it takes no step
                       KV  |== written by the old version ==|-- by the successor --►   never shared any more
    no room for both   it is preempted, and its KV is computed anew by the successor
    cannot change      (`Components.can_replace`, or too little memory) it finishes on the old version

Changes requests and what they count for in the adapter store. The scheduler owns it: it calls `apply` once a plan and
`follow` for each request that comes to the queue.
"""

from collections.abc import Callable, Iterable

from multilora.adapters.composition.namespaces import Namespaces
from multilora.adapters.lifecycle.components import Components
from multilora.adapters.lifecycle.store import LoadStatus
from multilora.engine.messages import AdapterSwitch, Output
from multilora.engine.scheduling.page_namespaces import PageNamespaces
from multilora.engine.scheduling.request import Request, RequestState
from multilora.errors import CannotFit


class AdapterUpdates:
    """preempt: sends a running request back to the queue. tell: takes what the front should hear."""

    def __init__(
        self,
        components: Components,
        namespaces: Namespaces,
        page_size: int,
        *,
        preempt: Callable[[Request], None],
        tell: Callable[[Output], None],
    ):
        self._components = components
        self._namespaces = namespaces
        self._page_size = page_size
        self._preempt = preempt
        self._tell = tell
        self._successors: dict[int, int] = {}  # version → what requests on it go on with
        self._pending: set[int] = set()  # versions with successors, which requests may still be running on

    def begin(self, version: int, successor: int, requests: Iterable[Request]) -> None:
        """From now on `successor` stands for `version`. requests: all that have not ended."""
        for old, new in self._successors.items():
            if new == version:
                self._successors[old] = successor
        self._successors[version] = successor
        self._pending.add(version)
        for request in list(requests):
            if request.state is RequestState.WAITING:
                self.follow(request)
            elif version in request.versions and not request.has_answer:
                self._preempt(request)  # which has it follow

    def follow(self, request: Request) -> None:
        """A waiting request goes on with the successors of its versions."""
        for version in request.versions if self._successors else ():
            successor = self._successor(request, version)
            if successor is not None:
                self._switch_waiting(request, version, successor)

    def apply(self, running: Iterable[Request], fence: int) -> None:
        """Before a plan: change the running requests whose successors are resident, hold up the others."""
        for version in list(self._pending):
            changing = [r for r in running if self._successor(r, version) is not None]
            if not changing:
                self._pending.discard(version)
                continue
            match self._components.request_load((self._successors[version],), fence, urgent=True):
                case LoadStatus.READY:
                    for request in changing:
                        if not request.progress.drafted:  # else once it is known which tokens are the old one's
                            self._switch_running(request, version, self._successors[version])
                case LoadStatus.COMING:
                    for request in changing:
                        request.stalled = True
                case LoadStatus.BLOCKED:
                    for request in changing:
                        self._preempt(request)

    def in_use(self, version: int) -> bool:
        """Whether a request is on the version, or about to go on with it."""
        coming = any(self._successors[old] == version for old in self._pending)
        return coming or self._components.in_use(version)

    def forget(self, version: int) -> None:
        """The version is unloaded, or cannot be brought back: nothing goes on with it, nor comes from it."""
        for old in [old for old, new in self._successors.items() if version in (old, new)]:
            del self._successors[old]
            self._pending.discard(old)

    # ------------------------------------------------------------------ inside

    def _successor(self, request: Request, version: int) -> int | None:
        """What the request goes on with instead of `version`; None: it is not on it, or cannot change."""
        successor = self._successors.get(version)
        if successor is None or version not in request.versions or successor in request.versions:
            return None
        changed = request.spec.with_successor(version, successor)
        composed = changed.adapters != ((successor, 1.0),)
        if not self._components.can_replace(version, successor, composed=composed):
            return None
        try:
            self._components.check_fit(changed.versions, changed.most_tokens)
        except CannotFit:
            return None
        return successor

    def _switch_running(self, request: Request, version: int, successor: int) -> None:
        """It keeps its pages, which from here on hold KV of both."""
        self._components.release_slots(request.versions)
        self._change(request, version, successor)
        self._components.acquire_slots(request.versions)
        request.lora_slots = self._components.slots(request.versions)
        request.mixed, request.stalled = True, False

    def _switch_waiting(self, request: Request, version: int, successor: int) -> None:
        """It holds no pages: all of its KV will be the successor's."""
        demand = int(request.queued_demand)
        self._components.count_waiting(request.versions, -1)
        self._components.count_demand(request.versions, -demand)
        self._change(request, version, successor)
        self._components.count_waiting(request.versions, 1)
        self._components.count_demand(request.versions, demand)
        if not request.has_answer:
            request.progress.prompt_logprobs.clear()

    def _change(self, request: Request, version: int, successor: int) -> None:
        before, after = request.spec, request.spec.with_successor(version, successor)
        PageNamespaces.release(self._namespaces, before.adapters, before.activation, self._page_size)
        request.spec = after
        request.namespaces = PageNamespaces.acquire(
            self._namespaces, after.adapters, after.activation, self._page_size
        )
        start = len(request.progress.output_ids) + request.progress.in_flight
        self._tell(Output(rid=request.rid, switch=AdapterSwitch(start, version, successor)))
