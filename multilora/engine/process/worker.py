"""The engine's process: messages from a ZeroMQ socket into the engine, its answers back.

Run by `client.py` as `python -m multilora.engine.process.worker ADDRESS PARENT PULSE`; the first message on the
socket is the Config, and heartbeats go to the descriptor PULSE. It ends when told to (after finishing what runs),
when its parent, process PARENT, is gone, or when a step fails: the front then starts another one. Of a parent that
was killed it deletes what that has left in TMPDIR.
"""

import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from time import monotonic
from typing import NoReturn

import msgspec
import zmq

from multilora import logs
from multilora.config import Config
from multilora.engine.build import build_engine
from multilora.engine.engine import Engine
from multilora.engine.messages import Failed, FromEngine, Shutdown, Spans, decode_to_engine, encode
from multilora.engine.process.pulse import Pulse
from multilora.engine.process.request_traces import RequestTraces
from multilora.engine.ranks.process import divide_cores
from multilora.errors import MultiloraError
from multilora.private_directory import close_all, end_process, remove_orphans

logger = logging.getLogger(__name__)

STATS_SECONDS = 1.0
PARENT_CHECK_MS = 1000
BUSY_CHECK_MS = 10
COPY_CHECK_MS = 1
ORPHAN_SECONDS = 5.0
"""From the end of the parent until this process is ended where it stands."""


class Worker:
    """The loop around one engine."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], parent: int, pulse: Pulse):
        self._engine = engine
        self._pulse = pulse
        self._socket = socket
        self._draining = False
        self._stats_at = 0.0
        self._changed = False  # something has come since the engine was last idle
        self._parent = parent
        self._traces = RequestTraces()
        engine.adapters.traces = self._traces
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        loader = engine.adapters.fileno()
        if loader is not None:
            self._poller.register(loader, zmq.POLLIN)

    def run(self) -> None:
        """Step the engine until it is drained, or the parent is gone."""
        gc.collect()
        gc.freeze()  # the objects that exist now stay; a collection that visits all of them takes 10 ms and more
        self._send(self._engine.ready())
        while not (self._draining and not self._engine.busy) and os.getppid() == self._parent:
            self._pulse.rounds += 1
            self._receive()
            said = self._engine.step()
            for message in said:
                self._send(message)
            self._tell_spans(said)
            self._tell_stats()

    def _receive(self) -> None:
        """Take in what has come; wait for something when there is nothing to run."""
        if not self._engine.running:
            if not self._engine.busy:
                self._idle()
            wait_ms = COPY_CHECK_MS if self._engine.copying else BUSY_CHECK_MS
            self._poller.poll(wait_ms if self._engine.busy else PARENT_CHECK_MS)
        while True:
            try:
                message = decode_to_engine(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if isinstance(message, Shutdown):
                self._draining = True
                self._engine.pauses.abort_frozen()
            else:
                self._traces.received(message)
                self._engine.handle(message)
                self._changed = True

    def _idle(self) -> None:
        """There is nothing to do: check the books and send statistics, once."""
        if self._changed:
            self._changed = False
            self._engine.check()
            self._send(self._engine.report.stats_update())
            self._stats_at = 0.0

    def _tell_stats(self) -> None:
        now = monotonic()
        if self._engine.busy and now - self._stats_at >= STATS_SECONDS:
            self._stats_at = now
            self._send(self._engine.report.stats_update())

    def _tell_spans(self, said: Sequence[FromEngine]) -> None:
        self._traces.sent(said)
        if records := self._traces.take_records():
            self._send(Spans(records))

    def _send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))


class ParentWatch:
    """Called now and then on a thread: once the parent is gone, deletes what that has left, and ends this process if
    that does not come to an end by itself."""

    def __init__(self, parent: int):
        self._parent = parent
        self._gone_at: float | None = None

    def __call__(self) -> None:
        if os.getppid() == self._parent:
            return
        remove_orphans()
        now = monotonic()
        if self._gone_at is None:
            self._gone_at = now
        elif now - self._gone_at > ORPHAN_SECONDS:
            close_all()
            os._exit(1)


def main(address: str, parent: int, pulse_fd: int) -> int:
    """Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the front decides when we stop
        signal.signal(number, signal.SIG_IGN)
    watch = ParentWatch(parent)
    pulse = Pulse(pulse_fd, watch)
    pulse.start()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(address)
    while not socket.poll(PARENT_CHECK_MS):
        if os.getppid() != parent:
            watch()
            return 1
    config = msgspec.msgpack.decode(socket.recv(), type=Config)
    logs.setup(config.log_level, role="engine", form=config.log_format)
    divide_cores(config.tp_size)
    try:
        engine = build_engine(config, own_process=True)
    except MultiloraError as e:
        socket.send(encode(Failed(e.kind, e.message)))
        context.destroy(linger=2000)
        return 1
    try:
        Worker(engine, socket, parent, pulse).run()
    except Exception:
        logger.exception("a step failed; the engine ends")
        _give_up(context)
    engine.close()
    context.destroy(linger=2000)
    watch()
    return 0


def _give_up(context: zmq.Context[zmq.Socket[bytes]]) -> NoReturn:
    """End the process at once and free nothing: after a CUDA error every release of device memory aborts the process,
    be it by a thread that ends or by the interpreter. The loader ends when it sees that its parent is gone."""
    context.destroy(linger=2000)
    logging.shutdown()
    os._exit(1)


if __name__ == "__main__":
    end_process(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
