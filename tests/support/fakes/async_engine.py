"""A real engine in this process behind the async methods of `EngineClient`: no process to start, no socket.

Steps whenever there is something to do and the event loop comes round. Keeps what the engine was told.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Self

from multilora.config import Config
from multilora.engine.build import build_engine
from multilora.engine.messages import AdapterInfo, FlushCache, Reply, ToEngine
from multilora.engine.process.local import LocalEngine
from multilora.errors import from_wire


class RecordingEngine(LocalEngine):
    """`told`: every message to the engine, in order."""

    def __init__(self, engine: Any):
        super().__init__(engine)
        self.told: list[Any] = []
        handle = engine.handle

        def recorded(message: Any) -> None:
            self.told.append(message)
            handle(message)

        engine.handle = recorded


class InProcessEngine(RecordingEngine):
    """Stands where an `EngineClient` stands."""

    @classmethod
    async def start(cls, config: Config) -> Self:
        return cls(build_engine(config))

    async def load_adapter(self, version: int, path: str, pinned: bool) -> AdapterInfo:  # type: ignore[override]
        reply = await self._call(super().load_adapter, version, path, pinned)
        assert reply.info is not None
        return reply.info

    async def unload_adapter(self, version: int) -> None:  # type: ignore[override]
        await self._call(super().unload_adapter, version)

    def submit(self, message: Any, deliver: Any) -> None:
        super().submit(message, deliver)
        self._pump()

    def abort(self, rid: str, message: str = "aborted") -> None:
        super().abort(rid, message)
        self._pump()

    async def flush_cache(self) -> None:
        await self.call(FlushCache)

    async def call(self, message: Callable[[int], ToEngine]) -> Reply:
        return await self._call(self.begin_call, message)

    async def shutdown(self, timeout: float = 60.0) -> None:
        self.engine.close()

    def end(self, why: str) -> None:
        raise AssertionError("nobody hurries")

    async def _call(self, begin: Any, *args: Any) -> Reply:
        answered = asyncio.get_running_loop().create_future()
        begin(*args, answered.set_result)
        self._pump()
        reply: Reply = await answered
        if not reply.ok:
            raise from_wire(reply.kind, reply.message)
        return reply

    def _pump(self) -> None:
        self._stepping = asyncio.ensure_future(self._step_while_busy())

    async def _step_while_busy(self) -> None:
        while self.engine.busy or self.calling:
            self.step()
            await asyncio.sleep(0)
