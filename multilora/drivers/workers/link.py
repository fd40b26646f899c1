"""A worker's end: the supervisor as its front's engine and as the one who answers its questions.

Changes of names are applied one after the other, beside the tokens that go on flowing; an answer that may refer to a
change waits for it. All methods belong to one event loop.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq.asyncio

from multilora.drivers.request_driver import RequestDriver
from multilora.engine.messages import Abort, Finish, Output, Ready, Submit, UseTokenizer
from multilora.errors import from_wire
from multilora.front.effects import Ask, Effect, Lane
from multilora.front.versions import UNLABELLED, VersionLabel
from multilora.front.workers.messages import (
    Answer,
    EndSample,
    FromWorker,
    NamesApplied,
    NamesChanged,
    Question,
    Relayed,
    ReleaseAdapters,
    ToWorker,
    Welcome,
    decode_to_worker,
    encode,
)
from multilora.front.workers.remote import WorkerFront

logger = logging.getLogger(__name__)


class SupervisorLink:
    """Made by `connect`. welcome: the supervisor's first message; label: see `SupervisorSide`."""

    def __init__(self, socket: zmq.asyncio.Socket, welcome: Welcome):
        self.welcome = welcome
        self.label: VersionLabel = UNLABELLED
        self._socket = socket
        self._receivers: dict[str, Callable[[Output], None]] = {}  # by key
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._last_call = 0
        self._names = NamesQueue(welcome.names.seq)

    @classmethod
    async def connect(cls, address: str) -> "SupervisorLink":
        """Wait for the supervisor's first message."""
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        socket.set(zmq.LINGER, 1000)
        socket.connect(address)
        welcome = decode_to_worker(await socket.recv())
        assert isinstance(welcome, Welcome)
        return cls(socket, welcome)

    @property
    def ready(self) -> Ready:
        return self.welcome.ready

    def send(self, message: FromWorker) -> None:
        self._socket.send(encode(message))

    def close(self) -> None:
        self._socket.close()

    # ------------------------------------------------------------------ requests

    def submit(self, message: Submit, deliver: Callable[[Output], None]) -> None:
        """See `RequestLink`."""
        self._receivers[message.rid] = deliver
        self.send(message)

    def abort(self, rid: str, message: str = "aborted") -> None:
        """See `RequestLink`."""
        if rid in self._receivers:
            self.send(Abort(rid, message))

    def finish(self, rid: str) -> None:
        """See `RequestLink`."""
        if self._receivers.pop(rid, None) is not None:
            self.send(Finish(rid))

    def use_tokenizer(self, info: str) -> None:
        """See `RequestLink`."""
        self.send(UseTokenizer(info))

    def end(self, key: str) -> None:
        """The sample has ended, and its client knows."""
        self._receivers.pop(key, None)
        self.send(EndSample(key))

    def release(self, hold: int) -> None:
        """The request has acquired its adapters, or failed."""
        self.send(ReleaseAdapters(hold))

    # ------------------------------------------------------------------ questions

    async def ask(
        self, question: Callable[[int], Question], undo: Callable[[Answer], object] = lambda _answer: None
    ) -> Answer:
        """The answer. Raises its typed error. undo: is given the answer if this is cancelled."""
        self._last_call += 1
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[self._last_call] = answered
        self.send(question(self._last_call))
        try:
            answer = await asyncio.shield(answered)
            await self._names.applied(answer.seq)
        except asyncio.CancelledError:
            answered.add_done_callback(partial(_undo, undo))
            raise
        if answer.kind:
            raise _error(answer)
        return answer

    # ------------------------------------------------------------------ what comes

    async def receive(self, front: WorkerFront, driver: RequestDriver, other: Callable[[ToWorker], None]) -> None:
        """Take in what comes, for ever; `other`: for what concerns neither requests nor names."""
        applying = asyncio.create_task(self._names.run(front, driver, self.send))
        try:
            while True:
                match decode_to_worker(await self._socket.recv()):
                    case Relayed() as relayed:
                        self._relay(relayed)
                    case Answer() as answer:
                        self._calls.pop(answer.call).set_result(answer)
                    case NamesChanged() as change:
                        self._names.put(change)
                    case message:
                        other(message)
        finally:
            applying.cancel()

    def _relay(self, relayed: Relayed) -> None:
        labels = deque(relayed.labels)
        for output in relayed.items:
            if output.switch is not None:
                self.label = labels.popleft()
            deliver = self._receivers.get(output.rid)
            if deliver is not None:  # else the sample has ended here
                if output.finished is not None:
                    del self._receivers[output.rid]
                deliver(output)


class NamesQueue:
    """Changes of names on their way into a front, in their order. seq: of the one that it begins with."""

    def __init__(self, seq: int) -> None:
        self._waiting: asyncio.Queue[NamesChanged] = asyncio.Queue()
        self._applied = seq
        self._moved = asyncio.Event()

    def put(self, change: NamesChanged) -> None:
        self._waiting.put_nowait(change)

    async def applied(self, seq: int) -> None:
        """Wait until the change of this number, and all before it, are what requests see."""
        while self._applied < seq:
            await self._moved.wait()

    async def run(self, front: WorkerFront, driver: RequestDriver, send: Callable[[FromWorker], None]) -> None:
        """Apply what is put, for ever."""
        while True:
            change = await self._waiting.get()
            for row in front.unread(change):
                await driver.run_blocking(Lane.FILES, partial(front.read_tokens, row))
            front.apply(change)
            self._applied = change.seq
            send(NamesApplied(change.seq))
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()


class WorkerDriver(RequestDriver):
    """Drives a worker's front on the running event loop."""

    def __init__(self, front: WorkerFront, link: SupervisorLink):
        super().__init__(front)
        self._link = link

    async def _perform(self, effect: Effect[Any]) -> Any:
        if isinstance(effect, Ask):
            return await self._link.ask(effect.question, effect.undo)
        return await super()._perform(effect)


def _error(answer: Answer) -> Exception:
    error = from_wire(answer.kind, answer.message)
    error.param = answer.param
    if answer.retry_after is not None and hasattr(error, "retry_after"):
        error.retry_after = answer.retry_after
    return error


def _undo(undo: Callable[[Answer], object], answered: "asyncio.Future[Answer]") -> None:
    if not answered.cancelled() and not answered.result().kind:
        undo(answered.result())
