"""Who runs in the next step: continuous batching, chunked prefill, adapter admission, preemption. Pure CPU.

`plan` and `commit` are separate, so that step N + 1 can be planned before the tokens of step N are known. Owns the
queues and the requests' states; memory and adapters are asked, not known.

Rules: decoding requests always go on, oldest first; prompts share `chunked_prefill_size` new tokens a step; which
waiting requests start is `admission.py`'s choice. When pages run out the policy's victim is preempted.
"""

from collections.abc import Callable, Sequence
from time import monotonic

from multilora.adapters.composition.namespaces import Namespaces
from multilora.adapters.lifecycle.components import Components
from multilora.adapters.lifecycle.disabled import AnyStore
from multilora.adapters.lifecycle.store import LoadStatus
from multilora.engine.messages import Finished, Output
from multilora.engine.plan import Chunk, PageUpdate, StepPlan, StepResult
from multilora.engine.sampling.state import SamplingState
from multilora.engine.scheduling.admission import MOST_FREED, Admission
from multilora.engine.scheduling.chunks import (
    LaunchedStep,
    adapter_order,
    make_chunk,
    make_draft_chunk,
    make_output,
    sampling_state,
    take_page_update,
)
from multilora.engine.scheduling.commits import Commits
from multilora.engine.scheduling.fair import EQUAL, FairWeights
from multilora.engine.scheduling.lora_journal import LoraJournal
from multilora.engine.scheduling.page_namespaces import PageNamespaces
from multilora.engine.scheduling.pause import SchedulingPause
from multilora.engine.scheduling.policy import MAX_WAIT, POLICIES
from multilora.engine.scheduling.request import Request, RequestSpec, RequestState
from multilora.engine.scheduling.slots import Slots
from multilora.engine.scheduling.speculation import Speculation
from multilora.engine.scheduling.step_cost import StepCost
from multilora.engine.scheduling.updates import AdapterUpdates
from multilora.engine.scheduling.waiting_queue import WaitingQueue
from multilora.errors import CannotFit, MultiloraError
from multilora.memory.page_table import KVPages


class Scheduler:
    """journal: where the device tier notes what happens to the LoRA table. speculation: None: nothing is drafted."""

    def __init__(
        self,
        kv: KVPages,
        adapters: AnyStore,
        namespaces: Namespaces,
        journal: LoraJournal,
        *,
        eos_token_ids: tuple[int, ...],
        max_running: int,
        chunk_tokens: int,
        policy: str = "fcfs",
        max_wait: float = MAX_WAIT,
        weights: FairWeights = EQUAL,
        speculation: Speculation | None = None,
        clock: Callable[[], float] = monotonic,
    ):
        self.kv = kv
        self.namespaces = namespaces
        self.pause = SchedulingPause()
        self.components = Components(adapters, kv)
        self.running: list[Request] = []  # by admission
        self.launched = 0  # number of the last plan
        self.preemptions = 0
        self.eos_token_ids = eos_token_ids
        self.clock = clock
        self._max_running = max_running
        self.chunk_tokens = chunk_tokens
        self._journal = journal
        self.policy = POLICIES[policy](lambda request: len(self._match(request)), max_wait, weights)
        self._queue = WaitingQueue(self.policy, self.components)
        self.waiting = self._queue.requests  # by order
        self.cost = StepCost()
        self._speculation = speculation
        self._commits = Commits(kv, eos_token_ids, finish=self._finish, clock=clock, speculation=speculation)
        self.counts = self._commits.counts
        self._admission = Admission(self.policy, self.components, self.cost, want=self._want, clock=clock)
        self._slots = Slots()
        self._installs: list[SamplingState] = []  # for the next plan
        self.steps: dict[int, LaunchedStep] = {}  # number → step, from plan to commit
        self._committed_at = 0.0
        self._requests: dict[str, Request] = {}
        self._outbox: list[Output] = []  # what no step brings: endings, and other adapter versions
        self.updates = AdapterUpdates(
            self.components, namespaces, kv.page_size, preempt=self._preempt, tell=lambda o: self._outbox.append(o)
        )

    # ------------------------------------------------------------------ requests come and go

    def add(self, spec: RequestSpec) -> None:
        """A new request, whose id is not in use."""
        request = self._requests[spec.rid] = Request.of(spec)
        page_size = self.kv.page_size
        request.namespaces = PageNamespaces.acquire(self.namespaces, spec.adapters, spec.activation, page_size)
        self._enqueue(request)

    def get(self, rid: str) -> Request | None:
        return self._requests.get(rid)

    def end(self, rid: str, finished: Finished | None) -> None:
        """End a request from outside; `finished` None: the front has told the client already."""
        request = self._requests.get(rid)
        if request is not None:
            self._finish(request)
            self._outbox = [output for output in self._outbox if output.rid != rid]
            if finished is not None:
                self._outbox.append(make_output(request, self.clock(), [], finished))

    def abort_all(self, message: str) -> None:
        """End every request with `abort`."""
        for rid in list(self._requests):
            self.end(rid, Finished(type="abort", message=message))

    def retract(self) -> None:
        """Send every running request back to the queue: it gives its pages back and is computed anew later."""
        for request in list(self.running):
            self._preempt(request)
        self.components.begin_plan()  # what the last plan asked for is not wanted now

    def fail_waiting(self, version: int, error: MultiloraError) -> None:
        """The adapter could not be brought back: the requests that wait for it end with the error."""
        self.updates.forget(version)
        for request in self.running:
            request.stalled = False
        for request in [r for r in self.waiting if version in r.versions]:
            self._fail(request, error)

    @property
    def queued_tokens(self) -> int:
        """The tokens of the prompts that wait."""
        return self._queue.tokens

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
        """The next step, or None if nothing can run now. Counts as launched: its pages and adapters are taken, its
        tokens are in flight. Every plan must be committed, in order. While paused nothing is planned."""
        if self.pause.frozen:
            return None
        self.components.begin_plan()
        self.updates.apply(self.running, self.launched)
        chunks: dict[Request, Chunk] = {}
        self._plan_decodes(chunks)
        left = self._plan_prompts(chunks, self.chunk_tokens)
        if self._speculation is not None:
            self._plan_drafts(self._speculation, chunks, left)
        return self._launch(chunks) if chunks else None

    def _plan_decodes(self, chunks: dict[Request, Chunk]) -> None:
        running, speculation = self.running, self._speculation
        ready = list(running) if speculation is None else speculation.ready(running, overlaps=bool(self.steps))
        for request in ready:
            waits = request.at_limit or request.stalled
            if request.state is RequestState.RUNNING and request.progress.decoding and not waits:
                self._take(chunks, request, 1)

    def _plan_drafts(self, speculation: Speculation, chunks: dict[Request, Chunk], budget: int) -> None:
        """Verify drafts in what is left of the step and of the free pages: they push nothing out."""
        rows = [request for request, chunk in chunks.items() if chunk.decodes]
        number, overlaps = self.launched + 1, bool(self.steps)
        for request, draft in speculation.drafts(rows, budget, number=number, overlaps=overlaps).items():
            start, table = request.progress.num_scheduled, request.table
            blocks = self.kv.blocks(table.pages) + self.kv.pool.free // self.kv.columns
            room = blocks * self.kv.page_size - start - 1
            if draft := draft[: max(0, room)]:
                grown = self.kv.grow(table, start + 1 + len(draft), self.launched)
                assert grown, "these pages were free"
                chunks[request] = make_draft_chunk(request, draft)

    def _plan_prompts(self, chunks: dict[Request, Chunk], budget: int) -> int:
        """Prompts that run go on, then others start; where one would take the whole step, the policy may turn that
        around for half of it. Returns the tokens that the step can still take."""
        running = [r for r in self.running if not r.progress.decoding and r.progress.remaining and not r.stalled]
        prompts = self.policy.prefills(running)
        if prompts and self.waiting and prompts[0].progress.remaining >= budget and self.policy.yields(prompts[0]):
            budget -= budget // 2 - self._admit(chunks, budget // 2)
            return self._plan_prefills(chunks, prompts, budget)
        return self._admit(chunks, self._plan_prefills(chunks, prompts, budget))

    def _plan_prefills(self, chunks: dict[Request, Chunk], prompts: Sequence[Request], budget: int) -> int:
        """Returns the tokens that the step can still take."""
        for request in prompts:
            if not budget:
                break
            if request.state is RequestState.RUNNING:
                budget -= self._take(chunks, request, min(request.progress.remaining, budget))
        return budget

    def _admit(self, chunks: dict[Request, Chunk], budget: int) -> int:
        """Returns the tokens of the budget that are left."""
        if not self.waiting:
            return budget
        slots = self._max_running - len(self.running)
        if not slots and budget:
            slots = self._free_slots(chunks)
        for request in self._admission.choose(self.waiting, list(chunks.values()), slots, budget):
            if budget == 0:
                break
            if not self.components.ready(request.versions):
                continue  # evicted for the pages of a request that started before
            self._count_hit(request)
            if self._start(request):
                budget -= self._take(chunks, request, min(request.progress.remaining, budget))
            elif not self._fail_if_unfittable(request):
                break
        return budget

    def _free_slots(self, chunks: dict[Request, Chunk]) -> int:
        """All slots are taken. How many the policy has had freed for the first ones that wait, as far as those can
        start at once. Those that are preempted for it find their pages again in the prefix cache."""
        freed = 0
        for first in self.policy.window(self.waiting, self.clock(), starting=False)[:MOST_FREED]:
            victim = self.policy.outranked(first, self.running)  # asked first: most policies have none, at no cost
            if victim is None or not self.kv.prefix.enabled:
                break
            can_start = not first.progress.in_flight and self.components.ready(first.versions)
            if not can_start or not self._fits(first, self._match(first)):
                break
            self._preempt(victim)
            chunks.pop(victim, None)
            freed += 1
        return freed

    def _want(self, request: Request, urgent: bool) -> LoadStatus:
        """An adapter comes only if the request could start then, and those that run go on for a while."""
        self._count_hit(request)
        spare = self.kv.most_pages(request.progress.num_tokens + 1) + len(self.running) * self.kv.columns
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
        if len(request.versions) > 1:
            try:
                self.components.check_fit(request.versions, request.spec.most_tokens)
            except CannotFit as error:
                self._fail(request, error)
                return True
        return False

    def _start(self, request: Request) -> bool:
        """Make a waiting request run, if the pages of all its tokens can be had. Its adapters are resident.

        False leaves everything as it was: nothing is acquired, touched or counted.
        """
        progress = request.progress
        matched = self._match(request)
        if not self._fits(request, matched):
            return False
        self.components.acquire_slots(request.versions)
        request.lora_slots = self.components.slots(request.versions)
        request.table = self.kv.start(matched)
        self._queue.dequeue(request)
        self.running.append(request)
        request.state = RequestState.RUNNING
        progress.restart(self.kv.blocks(matched) * self.kv.page_size)
        if request.slot is None:
            self._start_first(request)
        return True

    def _fits(self, request: Request, matched: list[int]) -> bool:
        """Whether the pages of all its tokens can be had, beside those that are `matched`."""
        spare = len(self.running) * self.kv.columns  # so that those who decode can go on for a while
        need = max(0, self.kv.most_pages(request.progress.num_tokens + 1) - self.kv.held(matched)) + spare
        # idle pages that it is about to use itself are no room for the others
        own = self.kv.idle_pages(matched) + self.components.idle_pages(request.versions)
        return self.kv.reclaimer.available() - own >= need

    def _start_first(self, request: Request) -> None:
        spec = request.spec
        request.admitted = self.clock()
        request.cached_tokens = request.progress.num_computed
        self.counts.cached += request.cached_tokens
        request.slot = self._slots.acquire()
        self._installs.append(sampling_state(spec, request.slot, self.eos_token_ids))

    def _take(self, chunks: dict[Request, Chunk], request: Request, count: int) -> int:
        """Put `count` tokens of a running request into the plan. Returns how many went in: all or none."""
        while not self.kv.grow(request.table, request.progress.num_scheduled + count, self.launched):
            victim = self.policy.victim(self.running)
            self._preempt(victim)
            chunks.pop(victim, None)
            if victim is request:
                return 0
        chunks[request] = make_chunk(request, count)
        return count

    def _preempt(self, request: Request) -> None:
        """Back to the queue, by age. Its full pages stay in the prefix cache as long as nobody needs the room."""
        self.preemptions += 1
        self._release_resources(request)
        request.restart()
        self._enqueue(request)

    def _launch(self, chunks: dict[Request, Chunk]) -> StepPlan:
        """The chunks as a plan, with what changed since the one before."""
        self.launched += 1
        runs = sorted(chunks.items(), key=adapter_order)
        pages: list[PageUpdate] = []
        for request, chunk in runs:
            if (sampled := len(chunk.answer_positions)) > 1:
                request.progress.schedule_draft(chunk.count - 1)
            else:
                request.progress.schedule(chunk.count, sampled)
            self.policy.charge(request, chunk.count)
            if update := take_page_update(request):
                pages.append(update)
        free = self._slots.recycle(self.kv.pool.completed)
        install, self._installs = self._installs, []
        plan = StepPlan(self.launched, [chunk for _, chunk in runs], free, install, pages, self._journal.take())
        self.steps[plan.number] = LaunchedStep(plan, [(request, request.epoch) for request, _ in runs], self.clock())
        return plan

    # ------------------------------------------------------------------ commit

    def commit(self, plan: StepPlan, result: StepResult) -> list[Output]:
        """The step has finished. Take in its tokens; returns what the front should hear."""
        step = self.steps.pop(plan.number)
        self.kv.pool.complete(plan.number)
        before, self._committed_at = self._committed_at, self.clock()
        self.cost.observe(plan.prompt_tokens, self._committed_at - max(step.launched_at, before))
        if self._speculation is not None:
            self._speculation.observe_step(plan, self._committed_at - before)
        return self._commits.take(step, result, self.launched)

    # ------------------------------------------------------------------ inside

    def _finish(self, request: Request) -> None:
        """The one place where a request ends."""
        assert request.state is not RequestState.FINISHED
        if request.state is RequestState.RUNNING:
            self._release_resources(request)
        else:
            self._queue.dequeue(request)
        request.state = RequestState.FINISHED
        self.policy.forget(request)
        if self._speculation is not None:
            self._speculation.forget(request)
        if request.slot is not None:
            self._slots.release(request.slot, self.launched)
            self._installs = [state for state in self._installs if state.slot != request.slot]
        spec = request.spec
        PageNamespaces.release(self.namespaces, spec.adapters, spec.activation, self.kv.page_size)
        del self._requests[spec.rid]

    def _release_resources(self, request: Request) -> None:
        """Leave `running`; pages and adapters are fenced by the last step launched, which may still use them."""
        self.running.remove(request)
        self.kv.release(request.table, self.launched)
        self.components.release_slots(request.versions)
        request.sent_pages = 0

    def _fail(self, request: Request, error: MultiloraError) -> None:
        self.end(request.rid, Finished(type="error", kind=error.kind, message=error.message))

    def _enqueue(self, request: Request) -> None:
        self._queue.enqueue(request)
        self.updates.follow(request)

    def _match(self, request: Request) -> list[int]:
        """Cached pages of its first tokens."""
        return self.kv.match(request.tokens(), request.namespaces.of, request.match_limit, request.spec.salt)
