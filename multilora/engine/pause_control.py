"""Performs `Pause`, `Resume`, `Sleep` and `WakeUp`: each changes at once what the scheduler plans, and is answered by
`settle` once it has come to rest. Owned by the engine.

    Pause ─► steps in flight are committed ─► requests are gone (wait) ─► frozen, answered
    Sleep ─► as Pause ─► adapter copies have ended ─► KV given back, adapters evicted ─► memory released, answered
"""

from collections.abc import Sequence

from multilora.adapters.lifecycle.disabled import AnyStore
from multilora.engine.messages import Pause as PauseMessage
from multilora.engine.messages import PauseMode, PauseState, Reply, Resume, Sleep, WakeUp
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.engine.sleep import DeviceSleep
from multilora.errors import BadRequest, MultiloraError

Message = PauseMessage | Resume | Sleep | WakeUp


class PauseControl:
    """memory: None where there is none to release, as in tests without a model."""

    def __init__(self, scheduler: Scheduler, adapters: AnyStore, memory: DeviceSleep | None):
        self._scheduler = scheduler
        self._adapters = adapters
        self._memory = memory
        self._pause = scheduler.pause
        self._resting: list[PauseMessage | Sleep] = []  # to be answered once the engine is at rest
        self._after_sleep: tuple[PauseMode | None, bool] = (None, True)  # mode and queues of the pause to go back to
        self._replies: list[Reply] = []
        self._level = 0  # of the sleep, as `PauseState` has it

    @property
    def working(self) -> bool:
        """`settle` has an answer to give, or waits for steps and copies that the engine must look after."""
        return bool(self._replies or self._resting)

    @property
    def state(self) -> PauseState:
        released = sorted(self._memory.released) if self._memory is not None else []
        return PauseState(mode=self._pause.mode, sleeping=self._pause.sleeping, level=self._level, released=released)

    def handle(self, message: Message) -> None:
        match message:
            case PauseMessage(mode=mode, queues=queues):
                self._begin(mode, queues=queues)
                self._resting.append(message)
            case Resume(call):
                self._resume(call)
            case Sleep():
                self._fall_asleep(message)
            case WakeUp(call, tags):
                self._wake_up(call, tags)

    def settle(self, *, in_flight: bool) -> list[Reply]:
        """Perform what waits for the engine to be at rest, if it is. Returns the answers to calls."""
        drained = self._pause.mode != "wait" or not self._scheduler.unfinished
        if self._resting and not in_flight and drained:
            sleeps = [message for message in self._resting if isinstance(message, Sleep)]
            if not sleeps or not self._adapters.copying:
                self._rest(sleeps)
        replies, self._replies = self._replies, []
        return replies

    def abort_frozen(self) -> None:
        """The engine is to end: requests that a pause keeps from finishing end with `abort`."""
        if self._pause.frozen:
            self._scheduler.abort_all("the engine was shut down while it was paused")

    # ------------------------------------------------------------------ inside

    def _begin(self, mode: PauseMode, *, queues: bool) -> None:
        self._pause.mode, self._pause.queues = mode, queues
        if mode == "abort":
            self._scheduler.abort_all("aborted: generation is paused")

    def _resume(self, call: int) -> None:
        if self._pause.sleeping:
            self._refuse(call, BadRequest("the engine is asleep: wake it up instead of resuming it"))
            return
        self._pause.mode, self._pause.queues = None, True
        self._end_resting("the pause ended before the engine was at rest")
        self._answer(call)

    def _fall_asleep(self, message: Sleep) -> None:
        if not self._pause.sleeping:
            kept = (self._pause.mode, self._pause.queues)
            self._after_sleep = kept if message.mode is None else (None, True)
        self._pause.sleeping = True
        self._level = max(self._level, message.level if "weights" in message.tags else 0)
        mode = message.mode or self._pause.mode or "keep"
        self._begin(mode, queues=message.level == 0)
        self._resting.append(message)

    def _wake_up(self, call: int, tags: Sequence[str]) -> None:
        self._end_resting("the engine was woken up before it was at rest")
        try:
            if self._memory is not None:
                self._memory.restore([tag for tag in ("weights", "kv_cache") if tag in tags])
        except MultiloraError as error:
            self._refuse(call, error)
            return
        if self._pause.sleeping and not self.state.released:
            self._pause.sleeping, self._level = False, 0
            self._pause.mode, self._pause.queues = self._after_sleep
            self._adapters.resume_copies()
        self._answer(call)

    def _rest(self, sleeps: Sequence[Sleep]) -> None:
        """No step is in flight."""
        if self._pause.mode == "retract":
            self._scheduler.retract()
        for sleep in sleeps:
            if sleep.level and sleep.tags:
                self._release(sleep)
        for message in self._resting:
            self._answer(message.call)
        self._resting = []

    def _release(self, sleep: Sleep) -> None:
        """Everything leaves the arena, then memory goes. KV of discarded weights is of no use either."""
        if "kv_cache" in sleep.tags or sleep.level > 1:
            fence = self._scheduler.launched
            self._scheduler.retract()
            self._scheduler.kv.prefix.flush(fence)
        if "kv_cache" in sleep.tags:
            self._adapters.suspend_copies(fence)
            assert self._scheduler.kv.pool.ready == self._scheduler.kv.pool.total, "the arena is in use"
        if self._memory is not None:
            self._memory.release(sleep.tags, sleep.level)

    def _end_resting(self, reason: str) -> None:
        for message in self._resting:
            self._refuse(message.call, BadRequest(reason))
        self._resting = []

    def _answer(self, call: int) -> None:
        self._replies.append(Reply(call=call, pause=self.state))

    def _refuse(self, call: int, error: MultiloraError) -> None:
        self._replies.append(Reply(call=call, ok=False, kind=error.kind, message=error.message, pause=self.state))
