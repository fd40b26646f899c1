"""The front processes of one server: started, kept alive, and told to end (--front-workers N, N > 1).

This process, the supervisor, has the engine, the registry and the whole application, but no port. Each worker listens
on a socket of its own for the same port (SO_REUSEPORT), among which the kernel shares out connections. The sockets
are made here and stay open here, so connections that come while a worker is started again wait for it. Workers answer
what generates and tokenizes; everything else they hand on (`relay.py`).

    clients ── HTTP ──► worker 1 … N: HTTP, text ── messages ──► supervisor: admission, registry ──► engine
                                 └────────── other requests, as ASGI ──────────┘
"""

import asyncio
import dataclasses
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic

from starlette.types import ASGIApp

from multilora.config import Config
from multilora.drivers.async_driver import AsyncDriver
from multilora.drivers.workers.names import NamesFeed
from multilora.drivers.workers.process import WorkerProcess
from multilora.errors import ConfigError, MultiloraError
from multilora.front.workers.messages import Drain, Observed, ReloadKeys, Welcome
from multilora.private_directory import PrivateDirectory
from multilora.server.metrics.collector import Metrics
from multilora.server.uvicorn_setup import WRITE_SECONDS
from multilora.server.workers.relay import RelayServer

logger = logging.getLogger(__name__)

MODULE = "multilora.server.workers.worker"
SETTLE_SECONDS = 10.0
"""For a worker to go by changed names; one that has not done so by then hangs, and is ended."""
COLLECT_SECONDS = 5.0
COLLECTED = ("/metrics", "/v1/loads", "/server_info", "/get_server_info", "/console/state", "/console/log")
"""Routes that show what workers have counted or logged."""
END_SECONDS = 2
"""From the end of its requests to a worker's."""
SHORT_LIFE_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 30.0


class FrontWorkers:
    """See `HttpFace`. config: as the engine has it; app: the whole application; listener: has the address, which it
    gives up; max_connections: of all workers together."""

    def __init__(
        self,
        config: Config,
        app: ASGIApp,
        listener: socket.socket,
        driver: AsyncDriver,
        metrics: Metrics,
        max_connections: int,
    ):
        share = -(-max_connections // config.front_workers)
        self._config = dataclasses.replace(config, max_connections=share)
        self._listener = listener
        self._driver = driver
        self._metrics = metrics
        self._names = NamesFeed(driver.front.registry)
        self._relay = RelayServer(app, self._before, self._settled)
        self._directory = PrivateDirectory("fronts")
        self._workers: dict[int, WorkerProcess] = {}  # by their place, those that serve
        self._stopping = asyncio.Event()
        self.restarts = 0

    async def serve(self, ready: Callable[[], None]) -> None:
        """Start the workers and keep them alive until `drain`; returns when all have ended. Raises EngineDead if one
        cannot be started at first."""
        with listening_sockets(self._listener, self._config.front_workers) as listeners:
            try:
                await self._relay.start(self._directory.path / "relay")
                await self._start_all(listeners)
                ready()
                await self._keep_all(listeners)
                for listener in listeners:
                    listener.close()
                for worker in self._workers.values():
                    worker.send(Drain())
                seconds = self._config.drain_seconds + WRITE_SECONDS + END_SECONDS
                await asyncio.gather(*(worker.close(seconds) for worker in list(self._workers.values())))
            finally:
                await self._close()

    def drain(self) -> None:
        self._stopping.set()

    def close_connections(self) -> None:
        for worker in list(self._workers.values()):
            worker.kill("the server was told twice to stop")

    async def _close(self) -> None:
        for worker in self._workers.values():
            if not worker.ended.done():
                worker.kill("the server ends")
        await asyncio.gather(*(worker.ended for worker in self._workers.values()))
        await self._relay.close()
        self._directory.close()

    def reload_keys(self) -> None:
        """--auth-file has been read again here: have the workers do so, too."""
        for worker in self._workers.values():
            worker.send(ReloadKeys())

    # ------------------------------------------------------------------ one worker

    async def _keep_all(self, listeners: list[socket.socket]) -> None:
        """Until `drain`."""
        keepers = [
            asyncio.create_task(self._keep(place, listener, self._workers[place]))
            for place, listener in enumerate(listeners)
        ]
        await self._stopping.wait()
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    async def _start_all(self, listeners: list[socket.socket]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for place, listener in enumerate(listeners):
                    group.create_task(self._start(place, listener))
        except BaseExceptionGroup as e:
            raise e.exceptions[0] from None

    async def _start(self, place: int, listener: socket.socket) -> WorkerProcess:
        worker = await WorkerProcess.start(
            f"front-{place + 1}",
            MODULE,
            listener.fileno(),
            self._directory.path,
            self._welcome,
            self._driver,
            self._names,
            self._observe,
            self._config.engine_heartbeat_timeout,
        )
        self._workers[place] = worker
        logger.info("%s serves", worker.name)
        return worker

    async def _keep(self, place: int, listener: socket.socket, worker: WorkerProcess) -> None:
        """Start another one whenever this one has ended."""
        pause, began = 0.0, monotonic()
        while True:
            code = await asyncio.shield(worker.ended)
            pause = min(2 * pause + 1, LONGEST_PAUSE_SECONDS) if monotonic() - began < SHORT_LIFE_SECONDS else 0.0
            logger.error("%s ended with code %d; starting another one in %.0f s", worker.name, code, pause)
            await asyncio.sleep(pause)
            began = monotonic()
            try:
                worker = await self._start(place, listener)
            except MultiloraError as e:
                logger.error("%s", e)
                continue
            self.restarts += 1

    def _welcome(self) -> Welcome:
        relay = str(self._directory.path / "relay")
        ready, config = self._driver.engine.ready, self._config
        return Welcome(config=config, ready=ready, names=self._names.snapshot(), relay=relay)

    # ------------------------------------------------------------------ what all must know

    async def _before(self, path: str) -> None:
        if path in COLLECTED:
            collects = [asyncio.create_task(worker.collect()) for worker in self._workers.values()]
            _, late = await asyncio.wait(collects, timeout=COLLECT_SECONDS)
            for collect in late:  # what a busy worker has counted since it last said so is shown the next time
                collect.cancel()

    async def _settled(self) -> None:
        late = await self._names.settled(SETTLE_SECONDS)
        for worker in self._workers.values():
            if worker.desk in late:
                worker.kill("it has not taken over changed adapters in time")

    def _observe(self, observed: Observed) -> None:
        self._metrics.add_observed(observed)
        self._driver.front.forget_unloaded(origin.adapter for origin, _ in observed.ended if origin.adapter)


@contextmanager
def listening_sockets(first: socket.socket, count: int) -> Iterator[list[socket.socket]]:
    """`count` sockets bound to the address of `first`, which holds it alone so far and is closed. Raises ConfigError
    where the system cannot share a port."""
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigError("--front-workers: this system does not let processes share a port (SO_REUSEPORT)")
    address, family = first.getsockname(), first.family
    first.close()
    with ExitStack() as stack:
        sockets = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            sockets.append(listener)
        yield sockets
