"""The requests that wait, by age, and what they count for while they do: with the policy, and with their adapters."""

import bisect

from multilora.adapters.lifecycle.components import Components
from multilora.engine.scheduling.policy import Policy
from multilora.engine.scheduling.request import Request, by_age


class WaitingQueue:
    """tokens: of the prompts in `requests`."""

    def __init__(self, policy: Policy, components: Components):
        self.requests: list[Request] = []
        self.tokens = 0
        self._policy = policy
        self._components = components

    def enqueue(self, request: Request) -> None:
        bisect.insort(self.requests, request, key=by_age)
        self.tokens += len(request.spec.prompt_ids)
        self._policy.enqueue(request)
        self._components.count_waiting(request.versions, 1)

    def dequeue(self, request: Request) -> None:
        del self.requests[bisect.bisect_left(self.requests, request.spec.order, key=by_age)]
        self.tokens -= len(request.spec.prompt_ids)
        self._policy.dequeue(request)
        self._components.count_waiting(request.versions, -1)
        if request.queued_demand:
            request.queued_demand = False
            self._components.count_demand(request.versions, -1)
