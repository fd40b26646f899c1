"""Who runs in the next step: continuous batching, chunked prefill, adapter admission, preemption. Pure CPU.

`plan` and `commit` are separate, so that step N + 1 can be planned before the tokens of step N are known; on CPU they
follow each other. Owns the queues and the requests' states; memory and adapters are asked, not known.

Rules: decoding requests always go on, oldest first; prompts share `chunked_prefill_size` new tokens a step; which
waiting requests start is `admission.py`'s choice. When pages run out the youngest running request is preempted.
"""

import bisect
from collections.abc import Callable
from time import monotonic

from multilora.adapters.composition.namespaces import Namespaces
from multilora.adapters.lifecycle.components import Components
from multilora.adapters.lifecycle.disabled import AnyStore
from multilora.adapters.lifecycle.store import LoadStatus
from multilora.engine.messages import Finished, Output
from multilora.engine.plan import Chunk, StepPlan, StepResult
from multilora.engine.scheduling.admission import MAX_WAIT, Admission
from multilora.engine.scheduling.policy import POLICIES
from multilora.engine.scheduling.request import PageNamespaces, Request, RequestState
from multilora.engine.scheduling.step_cost import StepCost
from multilora.errors import CannotFit, MultiloraError
from multilora.memory.page_table import KVPages
from multilora.params import Composition


class Scheduler:
    def __init__(
        self,
        kv: KVPages,
        adapters: AnyStore,
        namespaces: Namespaces,
        *,
        eos_token_ids: tuple[int, ...],
        max_running: int,
        chunk_tokens: int,
        policy: str = "fcfs",
        max_wait: float = MAX_WAIT,
        clock: Callable[[], float] = monotonic,
    ):
        self.kv = kv
        self.namespaces = namespaces
        self.components = Components(adapters, kv)
        self.waiting: list[Request] = []  # by order
        self.running: list[Request] = []  # by admission
        self.launched = 0  # number of the last plan
        self.preemptions = 0
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.eos_token_ids = eos_token_ids
        self._max_running = max_running
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._cost = StepCost()
        self._admission = Admission(
            POLICIES[policy], self.components, self._cost, want=self._want, matched=self._matched_pages,
            max_wait=max_wait, clock=clock,
        )  # fmt: skip
        self._launched_at: dict[int, float] = {}  # step → when, while it is on its way
        self._committed_at = 0.0
        self._requests: dict[str, Request] = {}
        self._outbox: list[Output] = []  # endings that no step brings

    # ------------------------------------------------------------------ requests come and go

    def add(self, request: Request) -> None:
        self._requests[request.rid] = request
        base_pages, pre_activation = divmod(request.activation, self.kv.page_size)
        edge, rest = (self.namespaces.acquire(request.adapters, n) for n in (pre_activation, 0))
        request.namespaces = PageNamespaces(base_pages, edge, rest)
        self._enqueue(request)

    def get(self, rid: str) -> Request | None:
        return self._requests.get(rid)

    def end(self, rid: str, finished: Finished | None) -> None:
        """End a request from outside; `finished` None: the front has told the client already."""
        request = self._requests.get(rid)
        if request is not None:
            self._finish(request)
            if finished is not None:
                self._outbox.append(self._output(request, [], finished))

    def fail_waiting(self, version: int, error: MultiloraError) -> None:
        """The adapter could not be brought back: who waits for it ends with the error."""
        for request in [r for r in self.waiting if version in r.versions]:
            self._fail(request, error)

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    @property
    def has_outbox(self) -> bool:
        return bool(self._outbox)

    def take_outbox(self) -> list[Output]:
        outputs, self._outbox = self._outbox, []
        return outputs

    # ------------------------------------------------------------------ plan

    def plan(self) -> StepPlan | None:
        """The next step, or None if nothing can run now. Pages and adapters are taken; tokens are not known yet."""
        self.components.begin_plan()
        chunks: dict[Request, Chunk] = {}
        self._plan_decodes(chunks)
        budget = self._plan_prefills(chunks, self._chunk_tokens)
        self._admit(chunks, budget)
        if not chunks:
            return None
        self.launched += 1
        return StepPlan(self.launched, tuple(sorted(chunks.values(), key=_neighbours)))

    def _plan_decodes(self, chunks: dict[Request, Chunk]) -> None:
        for request in list(self.running):
            ready = request.decoding and not request.at_limit and not request.needs_token
            if request.state is RequestState.RUNNING and ready:
                self._take(chunks, request, 1)

    def _plan_prefills(self, chunks: dict[Request, Chunk], budget: int) -> int:
        for request in list(self.running):
            if request.state is RequestState.RUNNING and not request.decoding and request.remaining and budget:
                budget -= self._take(chunks, request, min(request.remaining, budget))
        return budget

    def _admit(self, chunks: dict[Request, Chunk], budget: int) -> None:
        if not self.waiting:
            return
        slots = self._max_running - len(self.running)
        for request in self._admission.choose(self.waiting, list(chunks.values()), slots, budget):
            if budget == 0:
                return
            if not self.components.ready(request.versions):
                continue  # they have given way to pages of one that started before
            self._count_hit(request)
            if self._start(request):
                budget -= self._take(chunks, request, min(request.remaining, budget))
            elif not self._fail_if_unfittable(request):
                return

    def _want(self, request: Request, urgent: bool) -> LoadStatus:
        """An adapter comes only if the request could start then, and those that run go on for a while."""
        self._count_hit(request)
        spare = self.kv.pages_for(request.num_tokens + 1) + len(self.running)
        found = self.components.request_load(request.versions, self.launched, urgent=urgent, spare=spare)
        if found is LoadStatus.BLOCKED:
            self._fail_if_unfittable(request)
        return found

    def _count_hit(self, request: Request) -> None:
        if not request.hit_counted:
            request.hit_counted = True
            self.components.count_request(request.versions)

    def _fail_if_unfittable(self, request: Request) -> bool:
        """Since it came, pins or lower limits may have left a composition too little room for ever: it ends here.
        The store refuses what would do that to a single adapter."""
        if len(request.adapters) > 1:
            try:
                self.components.check_fit(request.versions, request.most_tokens)
            except CannotFit as error:
                self._fail(request, error)
                return True
        return False

    def _start(self, request: Request) -> bool:
        """Make a waiting request run, if the pages of all its tokens can be had. Its adapters are resident."""
        self.components.acquire_slots(request.versions)
        matched = self.kv.match(request.tokens(), request.namespaces.of, request.match_limit)
        table = self.kv.start(matched)
        spare = len(self.running)  # so that those who decode can go on for a while
        need = self.kv.pages_for(request.num_tokens + 1) - len(matched) + spare
        if self.kv.reclaimer.available() < need:
            self.kv.release(table, self.launched)
            self.components.release_slots(request.versions)
            return False
        self._dequeue(request)
        self.running.append(request)
        request.state = RequestState.RUNNING
        request.table = table
        request.num_computed = request.num_scheduled = len(matched) * self.kv.page_size
        if request.admitted is None:
            request.admitted = self._clock()
            request.cached_tokens = request.num_computed
            self.cached_tokens += request.num_computed
        return True

    def _take(self, chunks: dict[Request, Chunk], request: Request, count: int) -> int:
        """Put `count` tokens of a running request into the plan. Returns how many went in: all or none."""
        while not self.kv.grow(request.table, request.num_scheduled + count, self.launched):
            victim = max(self.running, key=lambda r: r.order)
            self._preempt(victim)
            chunks.pop(victim, None)
            if victim is request:
                return 0
        start = request.num_scheduled
        sample = count == request.remaining and request.samples
        chunks[request] = Chunk(
            request,
            request.epoch,
            start,
            count,
            sample,
            known=start + count <= request.num_tokens,
            answer_index=len(request.output_ids) + request.in_flight,
            slots=self.components.slots(request.versions),
            weights=request.weights,
            pre_activation=min(count, max(0, request.activation - start)),
            logprob_positions=request.prompt_logprob_positions(start, count),
        )
        return count

    def _preempt(self, request: Request) -> None:
        """Back to the queue, by age. Its full pages stay in the prefix cache as long as nobody needs the room."""
        self.preemptions += 1
        self._release_resources(request)
        request.state = RequestState.WAITING
        request.num_computed = request.num_scheduled = 0
        request.epoch += 1
        self._enqueue(request)

    # ------------------------------------------------------------------ commit

    def launch(self, plan: StepPlan) -> None:
        """The plan is on its way: its tokens count as planned."""
        self._launched_at[plan.number] = self._clock()
        for chunk in plan.chunks:
            chunk.request.num_scheduled += chunk.count
            chunk.request.in_flight += chunk.sample

    def commit(self, plan: StepPlan, result: StepResult) -> list[Output]:
        """The step has finished. Take in its tokens; returns what the front should hear."""
        self.kv.pool.complete(plan.number)
        begun = max(self._launched_at.pop(plan.number), self._committed_at)
        self._committed_at = self._clock()
        self._cost.observe(plan.prompt_tokens, self._committed_at - begun)
        outputs = []
        sampled = 0
        for i, chunk in enumerate(plan.chunks):
            request = chunk.request
            request.in_flight -= chunk.sample
            index = sampled
            sampled += chunk.sample
            if request.state is RequestState.FINISHED:
                continue  # it ended while this step was running: the row was wasted
            self._commit_kv(chunk)
            self._take_prompt_logprobs(chunk, result, i)
            output = self._commit_token(chunk, result, index)
            if output is not None:
                outputs.append(output)
        return outputs

    def _commit_kv(self, chunk: Chunk) -> None:
        request = chunk.request
        self.prompt_tokens += max(0, min(chunk.start + chunk.count, len(request.prompt_ids)) - chunk.start)
        if request.state is RequestState.RUNNING and request.epoch == chunk.epoch:
            request.num_computed += chunk.count
            self.kv.commit(request.table, request.num_computed, request.tokens, request.namespaces.of, self.launched)

    def _take_prompt_logprobs(self, chunk: Chunk, result: StepResult, index: int) -> None:
        request, positions = chunk.request, chunk.logprob_positions
        if positions:  # planned again after a preemption, it may bring some that have come in the meantime
            known = request.logprob_position - positions.start
            request.prompt_logprobs += result.prompt_logprobs[index][known:]
            request.prompt_top_logprobs += result.prompt_top_logprobs[index][known:]

    def _commit_token(self, chunk: Chunk, result: StepResult, index: int) -> Output | None:
        request = chunk.request
        if not chunk.sample:
            if request.samples or request.num_computed < request.num_tokens:
                return None
            self._finish(request)  # max_new_tokens 0: only the prompt was wanted
            return self._output(request, [], Finished(type="length"))
        if (error := result.errors[index]) is not None:
            self._finish(request)
            return self._output(request, [], Finished(type="error", kind="MultiloraError", message=error))
        token = result.token_ids[index]
        finished = request.accept(token, self.eos_token_ids)
        self.generated_tokens += 1
        if request.grammar is not None and finished is None and not request.grammar.accept(token):
            finished = Finished(type="error", kind="MultiloraError", message=f"token {token} left the grammar")
        if finished is not None:
            self._finish(request)
        return self._output(request, [token], finished, result, index)

    def _output(
        self,
        request: Request,
        tokens: list[int],
        finished: Finished | None,
        result: StepResult | None = None,
        index: int = 0,
    ) -> Output:
        first, request.first_output_sent = not request.first_output_sent, True
        wants_prompt = first and request.prompt_logprobs_from is not None
        head: list[None] = [None] if request.prompt_logprobs_from == 0 else []
        logprob = result.logprobs[index] if result else None
        top = result.top_logprobs[index] if result else None
        return Output(
            rid=request.rid,
            token_ids=tokens,
            finished=finished,
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=request.cached_tokens,
            queue_seconds=(request.admitted or self._clock()) - request.arrival,
            logprobs=[logprob] if logprob is not None else None,
            top_logprobs=[top] if top is not None else None,
            input_logprobs=[*head, *request.prompt_logprobs] if wants_prompt else None,
            input_top_logprobs=[*head, *request.prompt_top_logprobs] if wants_prompt else None,
        )

    # ------------------------------------------------------------------ inside

    def _finish(self, request: Request) -> None:
        """The one place where a request ends."""
        assert request.state is not RequestState.FINISHED
        if request.state is RequestState.RUNNING:
            self._release_resources(request)
        else:
            self._dequeue(request)
        request.state = RequestState.FINISHED
        self.namespaces.release(request.adapters, request.activation % self.kv.page_size)
        self.namespaces.release(request.adapters)
        del self._requests[request.rid]

    def _release_resources(self, request: Request) -> None:
        """Leave `running`; pages and adapters are fenced by the last step launched, which may still use them."""
        self.running.remove(request)
        self.kv.release(request.table, self.launched)
        self.components.release_slots(request.versions)

    def _fail(self, request: Request, error: MultiloraError) -> None:
        self.end(request.rid, Finished(type="error", kind=error.kind, message=error.message))

    def _enqueue(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=lambda r: r.order)
        self.components.count_waiting(request.versions, 1)

    def _dequeue(self, request: Request) -> None:
        self.waiting.remove(request)
        self.components.count_waiting(request.versions, -1)
        if request.queued_demand:
            request.queued_demand = False
            self.components.count_demand(request.versions, -1)

    def _matched_pages(self, request: Request) -> int:
        return len(self.kv.match(request.tokens(), request.namespaces.of, request.match_limit))


def _neighbours(chunk: Chunk) -> tuple[Composition, int]:
    """Equal compositions side by side, base first; among them first those that begin before activation."""
    acts = chunk.pre_activation < chunk.count
    return chunk.request.adapters if acts else (), -chunk.pre_activation
