"""The engine: messages in, messages out, one `step` at a time.

Owns the scheduler, the runner, the adapter store and the other ranks, which execute every plan as well; `build.py`
puts them together. Runs in its own process behind `worker.py`, or in the caller's under `LLM`.
"""

import logging
import random
from collections import deque
from collections.abc import Callable
from functools import partial

from multilora.adapters.lifecycle.disabled import AnyStore
from multilora.adapters.lifecycle.store import Loaded, Lost
from multilora.engine.execution.runner import Launched, Runner
from multilora.engine.messages import (
    Abort,
    AdapterInfo,
    Finish,
    Finished,
    FlushCache,
    FromEngine,
    LoadAdapter,
    Output,
    Outputs,
    Pause,
    Ready,
    ReplaceAdapter,
    Reply,
    Resume,
    ShareService,
    Sleep,
    StartProfile,
    Stats,
    StopProfile,
    Submit,
    ToEngine,
    UnloadAdapter,
    UseTokenizer,
    WakeUp,
)
from multilora.engine.pause_control import PauseControl
from multilora.engine.plan import StepPlan, StepResult
from multilora.engine.profiler import Profiler
from multilora.engine.ranks.lead import AnyRanks
from multilora.engine.scheduling.limits import RequestLimits
from multilora.engine.scheduling.request import RequestSpec
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.engine.sleep import DeviceSleep
from multilora.engine.stats import StatsReporter
from multilora.errors import AdapterNotLoaded, BadRequest, LoraNotEnabled, MultiloraError, UnknownAdapter
from multilora.params import Composition

logger = logging.getLogger(__name__)

MOST_FAILED_STEPS = 8
"""So many in a row are taken to be the fault of the requests in them."""


class Engine:
    """ahead: how many steps may be launched and not committed: 1 on CUDA, else 0. memory: what `Sleep` releases;
    None: nothing."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        adapters: AnyStore,
        ranks: AnyRanks,
        *,
        describe: Callable[[Stats], Ready],
        max_unfinished: int,
        max_queued_tokens: int | None = None,
        random_seed: int | None,
        ahead: int = 0,
        memory: DeviceSleep | None = None,
    ):
        self.scheduler = scheduler
        self.runner = runner
        self.adapters = adapters
        self._ranks = ranks
        self.pauses = PauseControl(scheduler, adapters, memory)
        self.report = StatsReporter(scheduler, adapters, lambda: self.pauses.state)
        self.profiler = Profiler()
        self._describe = describe
        self._limits = RequestLimits(scheduler, max_unfinished, max_queued_tokens)
        self._seeds = random.Random(random_seed)
        self._without_grammar: dict[str, Submit] = {}  # by rid: it is being compiled
        self._calls: dict[int, int] = {}  # version being loaded → call to answer
        self._unloads: list[UnloadAdapter] = []  # to be performed once no request is on the version
        self._replies: list[FromEngine] = []
        self._order = 0
        self._ahead = ahead
        self._failed_steps = 0  # in a row
        self._in_flight: deque[Launched] = deque()  # launched, not yet committed

    # ------------------------------------------------------------------ one step

    def step(self) -> list[FromEngine]:
        """Load → schedule → forward → sample → commit. Returns what the front should hear.

        With `ahead` 1 the step that is committed is the one before: the device computes while the host commits.
        Grammars must know the tokens of that step before this one is sampled, but not before its forward pass. Raises
        EngineDead once another rank has failed.
        """
        self._ranks.check()
        try:
            return self._step()
        except RuntimeError as e:  # of a collective, if a rank is gone
            error = self._ranks.failure(e)
            if error is e:
                raise
            raise error from e

    def _step(self) -> list[FromEngine]:
        self._poll_adapters()
        self._poll_grammars()
        self._limits.enforce()
        plan = self.scheduler.plan()
        outputs = self.scheduler.take_outbox()
        if plan is not None:
            self.profiler.before_step(plan.number)
            self._ranks.run_step(plan)
            outputs += self._launch(plan)
        outputs += self._commit(self._ahead if plan is not None else 0)
        self._poll_unloads()
        said = ([Outputs(outputs)] if outputs else []) + self._take_replies()
        return said + (self.pauses.settle(in_flight=bool(self._in_flight)) if self.pauses.working else [])

    def _launch(self, plan: StepPlan) -> list[Output]:
        """Have the device compute the plan. If that fails, only its requests end, where the device is sound."""
        self.runner.apply(plan)
        try:
            forward = self.runner.forward(plan)
        except Exception as e:  # noqa: BLE001 - raised again if it concerns others
            return self._fail(plan, e)
        outputs = self._commit(0) if self.runner.needs_tokens(plan) else []
        try:
            self._in_flight.append(self.runner.sample(forward))
        except Exception as e:  # noqa: BLE001
            return outputs + self._fail(plan, e)
        self._failed_steps = 0
        return outputs

    def _fail(self, plan: StepPlan, error: Exception) -> list[Output]:
        """End the requests of a step that could not be launched. Raises `error` if no other step would go better."""
        self._failed_steps += 1
        if self._ranks.size > 1 or self._failed_steps > MOST_FAILED_STEPS or not self.runner.is_sound(error):
            raise error
        logger.error("step %d failed; its requests end", plan.number, exc_info=error)
        outputs = self._commit(0)
        message = f"the step failed that this request was in: {type(error).__name__}: {error}"
        for request, _ in self.scheduler.steps[plan.number].runs:
            self.scheduler.end(request.rid, Finished(type="error", kind="StepFailed", message=message[:1000]))
        return outputs + self.scheduler.take_outbox() + self.scheduler.commit(plan, StepResult([], [], [], []))

    def _commit(self, ahead: int) -> list[Output]:
        """Read and commit the oldest steps until only `ahead` are in flight."""
        outputs = []
        while len(self._in_flight) > ahead:
            done = self._in_flight.popleft()
            outputs += self.scheduler.commit(done.plan, done.result())
            self.report.step(done.plan)
        return outputs

    @property
    def running(self) -> bool:
        """A step would compute or say something: do not wait before the next one."""
        waiting = self._in_flight or self._replies or self.scheduler.has_outbox
        runs = self.scheduler.running and not self.scheduler.pause.frozen
        return bool(runs or waiting or self.adapters.working)

    @property
    def busy(self) -> bool:
        """Something is unfinished: requests that are not frozen, answers, adapters on their way."""
        waits = (self.scheduler.unfinished or self._unloads) and not self.scheduler.pause.frozen
        return self.running or bool(waits or self.adapters.busy or self.pauses.working or self._without_grammar)

    @property
    def copying(self) -> bool:
        """Adapters are on their way to the device, which nothing but the next step notices."""
        return self.adapters.copying

    # ------------------------------------------------------------------ messages

    def handle(self, message: ToEngine) -> None:
        """Take in one message; answers come from `step`."""
        match message:
            case Submit():
                self._submit(message)
            case Abort(rid, text) if self._without_grammar.pop(rid, None) is not None:
                self._end_unstarted(rid, Finished(type="abort", message=text))
            case Abort(rid, text):
                self.scheduler.end(rid, Finished(type="abort", message=text))
            case Finish(rid):
                self.scheduler.end(rid, None)
            case LoadAdapter():
                self._load(message)
            case ReplaceAdapter(call, version, successor):
                self._answer(call, lambda: self._replace(version, successor))
            case UnloadAdapter():
                self._unloads.append(message)
                self._poll_unloads()
            case FlushCache(call, retract):
                self._answer(call, lambda: self._flush(retract=retract))
            case Pause() | Resume() | Sleep() | WakeUp():
                self.pauses.handle(message)
            case StartProfile():
                self._answer(message.call, lambda: self.profiler.start(message, self.scheduler.launched))
            case StopProfile(call):
                self._answer(call, self.profiler.stop)
            case ShareService(call, elsewhere):
                self.scheduler.policy.charge_elsewhere(elsewhere)
                self._replies.append(Reply(call=call, served=self.scheduler.policy.take_served()))
            case UseTokenizer(info):
                self._ranks.use_tokenizer(info)
                self.runner.use_tokenizer(info)
            case _:
                raise TypeError(f"not a message for the engine: {message}")

    def ready(self) -> Ready:
        return self._describe(self.report.stats())

    def set_lora_limits(self, device_bytes: int | None, max_count: int | None) -> None:
        """See `AdapterStore.set_limits`. Raises LoraNotEnabled, ConfigError."""
        self.adapters.set_limits(device_bytes=device_bytes, max_count=max_count, fence=self.scheduler.launched)

    def check(self) -> None:
        """Raise AssertionError if any pool's books do not balance. For tests and for idle moments."""
        self.scheduler.kv.pool.check()
        self.scheduler.kv.prefix.check()
        self.adapters.check()

    def close(self) -> None:
        self.adapters.close()
        self.runner.use_graphs(None)  # a group is not left while graphs hold its collectives
        self._ranks.close()

    # ------------------------------------------------------------------ inside

    def _submit(self, message: Submit) -> None:
        if message.grammar is not None and not self.runner.grammar_ready(message.grammar):
            self._without_grammar[message.rid] = message
            return
        try:
            self.scheduler.add(self._admit(message))
            self._limits.watch(message)
        except MultiloraError as e:
            self._end_unstarted(message.rid, Finished(type="error", kind=e.kind, message=e.message))

    def _end_unstarted(self, rid: str, finished: Finished) -> None:
        """The end of a request that the scheduler does not know."""
        self._replies.append(Outputs([Output(rid=rid, finished=finished)]))

    def _poll_grammars(self) -> None:
        """Take in the requests whose grammars are compiled by now."""
        texts = {message.grammar for message in self._without_grammar.values()}
        ready = {text for text in texts if text is not None and self.runner.grammar_ready(text)}
        if ready:
            for message in list(self._without_grammar.values()):
                if message.grammar in ready:
                    self._submit(self._without_grammar.pop(message.rid))

    def _admit(self, message: Submit) -> RequestSpec:
        """Checks that only the engine can make, then what the scheduler must know."""
        self.scheduler.pause.check_open()
        if self.scheduler.get(message.rid) is not None:
            raise BadRequest(f"request id {message.rid!r} is already in use", param="rid")
        self._limits.check(message)
        self._check_adapters(message.adapters)
        tokens = len(message.input_ids) + max(1, message.sampling.max_new_tokens or 0)
        self.scheduler.components.check_fit([version for version, _ in message.adapters], tokens)
        vocab_size = self._vocab_size_of(message.adapters)
        self.runner.check_sampling(message.sampling, vocab_size, message.grammar)
        seed = message.sampling.sampling_seed
        self._order += 1
        return RequestSpec.of(
            message,
            self._invocation_tokens(message.adapters),
            seed=self._seeds.getrandbits(63) if seed is None else seed,
            order=self._order,
            arrival=self.scheduler.clock(),
            vocab_size=vocab_size,
        )

    def _check_adapters(self, composition: Composition) -> None:
        """All known; several, or one with a weight, only if they are of low rank and nothing else."""
        for version, weight in composition:
            if not self.adapters.known(version):
                raise UnknownAdapter(f"adapter version {version} has never been loaded, or was unloaded")
            reason = self.adapters.get(version).not_composable_reason
            if reason and (len(composition) > 1 or weight != 1.0):
                raise BadRequest(f"adapter version {version} cannot be composed: {reason}", param="lora_path")

    def _invocation_tokens(self, composition: Composition) -> tuple[int, ...] | None:
        if len(composition) != 1:
            return None
        return self.adapters.get(composition[0][0]).invocation_tokens

    def _vocab_size_of(self, composition: Composition) -> int:
        """An adapter with its own head may have another one than the base model."""
        own = [self.adapters.get(version).vocab_size for version, _ in composition]
        return own[0] if own and own[0] is not None else self.runner.vocab_size

    def _load(self, message: LoadAdapter) -> None:
        try:
            self.adapters.load(message.version, message.path, message.pinned)
        except LoraNotEnabled as e:
            self._replies.append(Reply(call=message.call, ok=False, kind=e.kind, message=e.message))
            return
        self._calls[message.version] = message.call

    def _flush(self, *, retract: bool) -> None:
        if retract:
            self.scheduler.retract()
        self.scheduler.kv.prefix.flush(self.scheduler.launched)

    def _replace(self, version: int, successor: int) -> None:
        for one in (version, successor):
            if not self.adapters.known(one):
                raise AdapterNotLoaded(f"adapter version {one} does not exist")
        self.scheduler.updates.begin(version, successor, self.scheduler.running + self.scheduler.waiting)

    def _poll_unloads(self) -> None:
        """Perform those whose versions no request is on. What runs on one goes on with another, or ends."""
        for message in list(self._unloads):
            if not self.scheduler.updates.in_use(message.version):
                self._unloads.remove(message)
                self._answer(message.call, partial(self._unload, message.version))

    def _unload(self, version: int) -> None:
        self.adapters.unload(version, self.scheduler.launched)
        self.scheduler.updates.forget(version)
        self.scheduler.namespaces.drop(version, self.scheduler.launched)

    def _answer(self, call: int, action: Callable[[], None]) -> None:
        try:
            action()
            self._replies.append(Reply(call=call))
        except MultiloraError as e:
            self._replies.append(Reply(call=call, ok=False, kind=e.kind, message=e.message))

    def _poll_adapters(self) -> None:
        for event in self.adapters.poll_loads(self.scheduler.launched):
            match event:
                case Lost(version, error):
                    self.scheduler.fail_waiting(version, error)
                case Loaded(version, None):
                    if self.adapters.get(version).leaves_kv:
                        self.scheduler.namespaces.share_with_base(version)
                    self._replies.append(Reply(call=self._calls.pop(version), info=self._info(version)))
                case Loaded(version, MultiloraError() as error):
                    call = self._calls.pop(version)
                    self._replies.append(Reply(call=call, ok=False, kind=error.kind, message=error.message))

    def _info(self, version: int) -> AdapterInfo:
        adapter = self.adapters.get(version)
        return AdapterInfo(
            version=version,
            path=adapter.path,
            rank=adapter.rank,
            target_modules=adapter.target_modules,
            nbytes=adapter.pages * self.adapters.host_page_bytes,
            pages=adapter.pages,
            not_composable_reason=adapter.not_composable_reason,
            vocab_size=adapter.vocab_size,
            trains_tokens=adapter.trains_tokens,
            num_labels=adapter.num_labels,
            fingerprint=adapter.fingerprint,
        )

    def _take_replies(self) -> list[FromEngine]:
        replies, self._replies = self._replies, []
        return replies
