"""One front process of several: HTTP, tokenizing and formatting, for the engine and registry of its supervisor.

Run by `pool.py` as `python -m multilora.server.workers.worker NAME ADDRESS PARENT LISTENER`: the first message on
the socket at ADDRESS is the `Welcome`; LISTENER is the descriptor of a bound socket. It ends when told to (after
finishing what runs), or when its parent, process PARENT, is gone.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from multilora import logs
from multilora.config import Config
from multilora.drivers.workers.link import SupervisorLink, WorkerDriver
from multilora.errors import MultiloraError
from multilora.front.workers.messages import Collect, Drain, JoinNames, ReloadKeys, Serving, ToWorker
from multilora.front.workers.remote import WorkerFront
from multilora.private_directory import close_all, remove_orphans
from multilora.server.connections import connections_within, raise_descriptor_limit
from multilora.server.key_ring import KeyRing
from multilora.server.request_body import Bodies
from multilora.server.text import load_text
from multilora.server.tracing.exporter import SpanExporter
from multilora.server.uvicorn_setup import (
    WRITE_SECONDS,
    QuietServer,
    event_loop,
    freeze_objects,
    tls_settings,
    uvicorn_config,
)
from multilora.server.workers.app import create_worker_app
from multilora.server.workers.events import WorkerEvents

logger = logging.getLogger("multilora.server.workers.worker")  # as __name__ is "__main__" where it is run

OBSERVED_SECONDS = 0.5
"""At most so old is what the supervisor knows of a worker's counts when it dies. That they are said, though there be
none, is the sign that this event loop lives."""
PARENT_CHECK_SECONDS = 0.5


class FrontProcess:
    """What runs in the process, but for its signals and its end. lines: what it logs; made: called when all that it
    needs is there."""

    def __init__(
        self,
        link: SupervisorLink,
        listener: socket.socket,
        lines: logs.RecentLines,
        made: Callable[[], None] = lambda: None,
    ):
        self._made = made
        self._link = link
        self._listener = listener
        self._events = WorkerEvents(lines)
        self._config: Config = link.welcome.config
        self._keys = KeyRing(self._config)
        self._traces = SpanExporter.of(self._config)
        self._server: QuietServer | None = None

    async def run(self) -> None:
        """Serve until told to end. The link is closed then."""
        try:
            await self._run()
        finally:
            self._link.close()

    async def _run(self) -> None:
        config, welcome = self._config, self._link.welcome
        tokenizer, defaults = await asyncio.to_thread(load_text, config)
        front = WorkerFront(config, self._link, tokenizer, self._events)
        driver = WorkerDriver(front, self._link)
        for row in front.unread(welcome.names):
            await asyncio.to_thread(front.read_tokens, row)
        front.apply(welcome.names)
        bodies = Bodies(config.max_body_bytes, (config.log_level, config.log_format))
        bodies.process.start()  # ahead of the first large body
        app = create_worker_app(
            driver, defaults, self._events, self._keys, self._link, welcome.relay, self._traces, bodies
        )
        descriptors = raise_descriptor_limit()
        most = config.max_connections or connections_within(descriptors)
        settings = uvicorn_config(app, most, config.drain_seconds + WRITE_SECONDS, tls_settings(config))
        logger.info("up to %d connections are taken", most)
        self._server = QuietServer(settings, lambda: self._link.send(Serving()))
        receiving = asyncio.create_task(self._link.receive(front, driver, self._take))
        telling = asyncio.create_task(self._tell())
        try:
            self._made()
            await self._link.ask(JoinNames)
            serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
            await asyncio.wait({serving, receiving}, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():  # nothing would reach this process any more
                receiving.result()
            await serving
        finally:
            for task in (receiving, telling):
                task.cancel()
            self._link.send(self._events.take())
            await driver.close()
            bodies.process.close()
            if self._traces is not None:
                self._traces.close()

    def _take(self, message: ToWorker) -> None:
        assert self._server is not None
        match message:
            case Drain():
                self._server.should_exit = True
            case ReloadKeys():
                self._keys.reload()
            case Collect(call):
                self._link.send(self._events.take(call))
            case other:
                raise AssertionError(f"not expected now: {other!r:.100}")

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(OBSERVED_SECONDS)
            self._link.send(self._events.take())


def watch_parent(parent: int) -> None:
    """On a thread: end this process as soon as its parent is gone, whatever it does."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        remove_orphans()
        close_all()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


async def _serve(name: str, address: str, listener: socket.socket) -> int:
    link = await SupervisorLink.connect(address)
    config = link.welcome.config
    logs.setup(config.log_level, role=name, form=config.log_format)
    try:
        await FrontProcess(link, listener, logs.RECENT, freeze_objects).run()
    except MultiloraError as e:
        logger.error("this front process cannot serve: %s", e)
        return 1
    return 0


def main(name: str, address: str, parent: int, listener: int) -> int:
    """Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the supervisor decides when we stop
        signal.signal(number, signal.SIG_IGN)
    watch_parent(parent)
    with socket.socket(fileno=listener) as bound, asyncio.Runner(loop_factory=event_loop()) as runner:
        return runner.run(_serve(name, address, bound))


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    close_all()
    logging.shutdown()
    os._exit(code)  # threads that still read or tokenize hold up nobody
