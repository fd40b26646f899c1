"""A server with several front processes in one event loop, for tests: everything is real (sockets, uvicorn, the
messages) but the processes, the engine and the port.

    async with Workers(monkeypatch, client, tokenizer) as server:
        await server.on(1, "POST", "/generate", body)
"""

import asyncio
import socket
from typing import Any

from fakes.server_app import SECONDS, Answer, Connection, LocalServer
from multilora.drivers.workers.link import SupervisorLink
from multilora.drivers.workers.process import WorkerProcess
from multilora.logs import RecentLines
from multilora.server.workers import worker as worker_module
from multilora.server.workers.pool import FrontWorkers
from multilora.server.workers.worker import FrontProcess

NO_PROCESS = 1 << 30  # no system has such an id


class InProcess:
    """Stands where a worker's `asyncio.subprocess.Process` stands. `face`: the `FrontProcess`, once it has begun."""

    def __init__(self, address: str, listener: int):
        self.pid = NO_PROCESS
        self.face: FrontProcess | None = None
        self.killed = False
        self._listener = socket.socket(fileno=socket.dup(listener))
        self._task = asyncio.create_task(self._run(address))

    async def _run(self, address: str) -> None:
        with self._listener:
            self.face = FrontProcess(await SupervisorLink.connect(address), self._listener, RecentLines())
            await self.face.run()

    async def wait(self) -> int:
        await asyncio.wait({self._task})
        return -9 if self.killed else 1 if self._task.exception() else 0

    def kill(self) -> None:
        """As SIGKILL: nothing is said any more."""
        if not self._task.done():
            self.killed = True
            if self.face is not None:
                self.face._link.send = lambda _message: None
            self._task.cancel()


class Workers(LocalServer):
    """A LocalServer whose application is the supervisor's; `on` sends to a worker. Within `async with`, in one event
    loop."""

    def __init__(self, monkeypatch: Any, client: Any, tokenizer: Any = None, count: int = 2, **config: Any):
        super().__init__(client, tokenizer, front_workers=count, **config)
        self.processes: list[InProcess] = []  # all that were started, in order
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        monkeypatch.setattr(worker_module, "load_text", lambda config: (tokenizer, {}))
        monkeypatch.setattr(WorkerProcess, "_kill_group", lambda worker: worker._process.kill())
        monkeypatch.setattr("multilora.drivers.workers.process.asyncio.create_subprocess_exec", self._begin)

    async def _begin(self, *command: str, **options: Any) -> InProcess:
        address, _, listener = command[-3:]
        self.processes.append(InProcess(address, int(listener)))
        return self.processes[-1]

    async def __aenter__(self) -> "Workers":
        ready = asyncio.Event()
        self.pool = FrontWorkers(
            self.config, self.app, self._listener, self.driver, self.app.state.metrics, max_connections=64
        )
        self.serving = asyncio.create_task(self.pool.serve(ready.set))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({waiting, self.serving}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self.serving.done():
            self.serving.result()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.pool.drain()
        await asyncio.wait_for(self.serving, SECONDS)

    async def load_from(self, name: str, path: str, **options: Any) -> None:
        """As a client's load, whose answer waits for all workers."""
        await super().load_from(name, path, **options)
        await self.pool._settled()

    def face(self, place: int) -> FrontProcess:
        """The process that serves at this place now."""
        process = self.pool._workers[place]._process
        assert isinstance(process, InProcess) and process.face is not None
        return process.face

    def connect_on(self, place: int, method: str, path: str, body: Any = None, **headers: str) -> Connection:
        """A request to one of the workers, as it comes from its connections."""
        server = self.face(place)._server
        assert server is not None
        return Connection(server.config.app, method, path, body, headers)

    async def on(self, place: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        return await self.connect_on(place, method, path, body, **headers).answer()
