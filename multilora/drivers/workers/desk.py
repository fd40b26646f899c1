"""The supervisor's end of one worker's socket: does what the worker's requests want of the one front that may.

It owns the worker's tickets and holds: whatever becomes of the worker, `close` ends all of them, and the engine drops
their requests. Outputs are gathered for one turn of the event loop, so a step of the engine is one message to each
worker. All methods belong to one event loop.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from multilora.drivers.async_driver import AsyncDriver
from multilora.engine.messages import Abort, Finish, Finished, Output, Submit, UseTokenizer
from multilora.errors import MultiloraError, ServerStopping
from multilora.front.access import CALLER, Caller
from multilora.front.adapter_ref import Held
from multilora.front.admission import Ticket
from multilora.front.versions import VersionLabel
from multilora.front.workers.messages import (
    Answer,
    EndSample,
    FromWorker,
    HoldAdapters,
    JoinNames,
    NamesApplied,
    Observed,
    OpenSamples,
    Relayed,
    ReleaseAdapters,
    SampleRow,
    TakeRequest,
    ToWorker,
)
from multilora.tracing import CURRENT, span_elsewhere

logger = logging.getLogger(__name__)

PROCESS = "front"
"""What spans of this process say."""
GONE = "the front process of this request has ended"


class Desk:
    """Answers the questions of one worker. send: to it; joined: changes of names are to wait for it;
    seq: the number of the latest that it was sent, applied: of the latest that its requests see."""

    def __init__(self, driver: AsyncDriver, send: Callable[[ToWorker], None], observe: Callable[[Observed], None]):
        self.joined = False
        self.seq = self.applied = 0
        self._driver = driver
        self._front = driver.front
        self._send = send
        self._observe = observe
        self._tickets: dict[str, Ticket] = {}  # by key
        self._holds: dict[int, Sequence[Held]] = {}
        self._next_hold = itertools.count(1)
        self._holding: set[asyncio.Task[None]] = set()
        self._outbox: list[Output] = []
        self._labels: list[VersionLabel] = []
        self._closed = False

    def take(self, message: FromWorker) -> None:
        """What the worker says about its requests."""
        match message:
            case Submit():
                self._submit(message)
            case Abort(key, text):
                self._front.engine.abort(key, text)
            case Finish(key):
                self._front.engine.finish(key)
            case EndSample(key):
                self._front.admission.end(self._tickets.pop(key))
            case OpenSamples():
                self._answer(message.call, partial(self._open, message))
            case JoinNames(call):
                self.joined = True
                self._send(Answer(call=call, seq=self.seq))
            case TakeRequest(call=call, caller=caller):
                self._answer(call, partial(self._take_request, call, caller))
            case HoldAdapters():
                self._start_hold(message)
            case ReleaseAdapters(hold):
                self._front.resolver.release(self._holds.pop(hold))
            case UseTokenizer(info):
                self._front.engine.use_tokenizer(info)
            case NamesApplied(seq):
                self.applied = seq
            case Observed():
                self._observe(message)
            case other:
                raise AssertionError(f"not expected now: {other!r:.100}")

    def close(self) -> None:
        """The worker is gone: its requests end, and what they hold is free."""
        self._closed = True
        for task in self._holding:
            task.cancel()
        for held in self._holds.values():
            self._front.resolver.release(held)
        self._holds.clear()
        tickets, self._tickets = self._tickets, {}
        for key, ticket in tickets.items():
            if ticket.submitted:
                self._front.engine.abort(key, GONE)
            self._front.admission.end(ticket)

    # ------------------------------------------------------------------ questions

    def _answer(self, call: int, work: Callable[[], Answer]) -> None:
        try:
            answer = work()
        except MultiloraError as e:
            answer = self._failure(call, e)
        except Exception as e:  # it would end what all workers are told
            logger.exception("a worker's question could not be answered")
            answer = self._failure(call, MultiloraError(f"internal error: {type(e).__name__}"))
        self._send(answer)

    def _failure(self, call: int, error: MultiloraError) -> Answer:
        wait = getattr(error, "retry_after", None)
        return Answer(call=call, kind=error.kind, message=error.message, param=error.param, retry_after=wait)

    def _open(self, message: OpenSamples) -> Answer:
        with acting_as(message.caller):
            tickets = self._front.admission.open_now(message.wanted, message.rids)
        self._tickets |= {ticket.key: ticket for ticket in itertools.chain(*tickets)}
        rows = [[SampleRow.of(ticket) for ticket in found] for found in tickets]
        return Answer(call=message.call, seq=self.seq, samples=rows)

    def _take_request(self, call: int, caller: Caller) -> Answer:
        self._front.quotas.take_request(caller)
        return Answer(call=call)

    def _start_hold(self, message: HoldAdapters) -> None:
        with acting_as(message.caller), self._below(message.traceparent):  # which the task inherits
            task = asyncio.create_task(self._hold(message))
        self._holding.add(task)
        task.add_done_callback(self._holding.discard)

    @contextmanager
    def _below(self, traceparent: str | None) -> Iterator[None]:
        """What is done within this belongs below the worker's span."""
        export = self._driver.export_span
        token = CURRENT.set(None if export is None else span_elsewhere(traceparent, PROCESS, export))
        try:
            yield
        finally:
            CURRENT.reset(token)

    async def _hold(self, message: HoldAdapters) -> None:
        try:
            held = await self._driver.hold(message.names)
        except MultiloraError as e:
            self._send(self._failure(message.call, e))
            return
        number = next(self._next_hold)
        self._holds[number] = held
        self._send(Answer(call=message.call, seq=self.seq, hold=number))

    # ------------------------------------------------------------------ requests

    def _submit(self, message: Submit) -> None:
        ticket = self._tickets[message.rid]
        try:
            self._front.admission.submit(ticket, message, partial(self._relay, ticket))
        except ServerStopping as e:
            self._relay(ticket, Output(rid=ticket.key, finished=Finished("error", message=e.message, kind=e.kind)))

    def _relay(self, ticket: Ticket, output: Output) -> None:
        if self._closed:
            return
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(output)
        if output.switch is not None:
            self._labels.append(ticket.held.label)

    def _flush(self) -> None:
        outputs, self._outbox = self._outbox, []
        labels, self._labels = self._labels, []
        if not self._closed:
            self._send(Relayed(outputs, labels))


@contextmanager
def acting_as(caller: Caller) -> Iterator[None]:
    """Within this, `CALLER` is whom a worker's request comes from."""
    token = CALLER.set(caller)
    try:
        yield
    finally:
        CALLER.reset(token)
