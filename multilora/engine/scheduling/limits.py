"""What ends a request before its time, or keeps it out: deadlines, and bounds of the queue.

Owns the deadlines of the requests that have one. `Engine` asks it about every new request and before every step.
"""

import heapq

from multilora.engine.messages import Finished, Submit
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.errors import DeadlineExceeded, QueueFull

TOO_LONG = "the request took longer than its timeout or --max-request-seconds"


class RequestLimits:
    """max_unfinished: requests that may run or wait; max_queued_tokens: tokens of prompts that may wait, None: any
    number."""

    def __init__(self, scheduler: Scheduler, max_unfinished: int, max_queued_tokens: int | None):
        self._scheduler = scheduler
        self._max_unfinished = max_unfinished
        self._max_queued_tokens = max_queued_tokens
        self._deadlines: list[tuple[float, str]] = []  # a heap, with request ids; some have ended meanwhile

    def check(self, message: Submit) -> None:
        """Raise QueueFull if there is no room for a new request, or its deadline cannot be met; DeadlineExceeded if
        that is past."""
        scheduler, queued = self._scheduler, self._scheduler.queued_tokens
        if scheduler.unfinished >= self._max_unfinished:
            raise QueueFull(f"{scheduler.unfinished} requests run or wait already (--max-queued-requests)")
        most = self._max_queued_tokens
        if scheduler.waiting and most is not None and queued + len(message.input_ids) > most:
            raise QueueFull(f"{queued} prompt tokens are waiting already (--max-queued-tokens)")
        if message.deadline is not None:
            self._check_deadline(message, message.deadline - scheduler.clock())

    def _check_deadline(self, message: Submit, left: float) -> None:
        if left <= 0:  # its grammar took all the time
            raise DeadlineExceeded(TOO_LONG)
        need = self._seconds_to_first_token(message)
        if need > left:
            raise QueueFull(
                f"the first token would take about {need:.1f} s, the request ends in {left:.1f} s (timeout "
                "or --max-request-seconds)"
            )

    def _seconds_to_first_token(self, message: Submit) -> float:
        """About how long a new request waits and is read, judged by the steps so far; 0 if there were none. As large
        a part of the tokens as until now is expected to be cached."""
        scheduler, cost = self._scheduler, self._scheduler.cost
        counts = scheduler.counts
        tokens = scheduler.policy.queued_before(message.tenant, scheduler.queued_tokens) + len(message.input_ids)
        known = counts.prompt + counts.cached
        computed = tokens * counts.prompt / known if known else tokens
        return cost.fixed * max(1.0, computed / scheduler.chunk_tokens) + cost.per_token * computed

    def watch(self, message: Submit) -> None:
        """The request has been taken in: it ends at its deadline, if it has one."""
        if message.deadline is not None:
            heapq.heappush(self._deadlines, (message.deadline, message.rid))

    def enforce(self) -> None:
        """End what is past its deadline: with `abort` if part of the answer has been sent, else with an error."""
        now = self._scheduler.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, rid = heapq.heappop(self._deadlines)
            request = self._scheduler.get(rid)
            if request is None:
                continue
            error = DeadlineExceeded(TOO_LONG)
            if request.first_output_sent:
                finished = Finished(type="abort", message=error.message)
            else:
                finished = Finished(type="error", kind=error.kind, message=error.message)
            self._scheduler.end(rid, finished)
