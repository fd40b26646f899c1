"""Stands where `engine.process.client.EngineClient` stands under a supervisor: an engine that dies when told to.

A request gets tokens when the test says so. Everything that the engine was given is in the public lists.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakes.models import FakeEngineClient
from multilora.engine.messages import AdapterInfo, Finished, Output, PauseState, Reply, Submit
from multilora.errors import EngineDead, MultiloraError


class FakeEngineProcess:
    """`loads`: path → fingerprint, or the error of a load; `gate`: loads wait while it is clear."""

    def __init__(self, loads: dict[str, Any]) -> None:
        self.ready = FakeEngineClient().ready
        self.stats = self.ready.stats
        self.profile_root = Path("profiles")
        self.on_end: Callable[[str], None] = lambda _reason: None
        self.alive = True
        self.closed = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.ended = asyncio.Event()
        self.loads = loads
        self.loaded: dict[int, str] = {}
        self.requests: dict[str, tuple[Submit, Callable[[Output], None]]] = {}
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.calls: list[Any] = []
        self.tokenizer: str | None = None

    def die(self, reason: str = "the engine process ended with code -9") -> None:
        """As `EngineClient` does: `on_end` first, then every request and every call."""
        self.alive = False
        self.on_end(reason)
        requests, self.requests = self.requests, {}
        for rid, (_, deliver) in requests.items():
            deliver(Output(rid=rid, finished=Finished(type="error", kind="EngineDead", message=reason)))
        self.ended.set()

    def kill(self, why: str) -> None:
        self.die(why)

    def say(self, rid: str, *tokens: int, end: bool = False) -> None:
        """An Output of a request."""
        finished = Finished(type="length") if end else None
        _, deliver = self.requests.pop(rid) if end else self.requests[rid]
        deliver(Output(rid=rid, token_ids=list(tokens), finished=finished))

    # what the supervisor calls

    def submit(self, message: Submit, deliver: Callable[[Output], None]) -> None:
        self.requests[message.rid] = (message, deliver)

    def abort(self, rid: str, message: str = "aborted") -> None:
        self.aborted.append(rid)
        _, deliver = self.requests.pop(rid)
        deliver(Output(rid=rid, finished=Finished(type="abort", message=message)))

    def finish(self, rid: str) -> None:
        self.finished.append(rid)
        del self.requests[rid]

    def use_tokenizer(self, info: str) -> None:
        self.tokenizer = info

    async def load_adapter(self, version: int, path: str, pinned: bool) -> AdapterInfo:
        await self._until_open()
        found = self.loads.get(path, path)
        if isinstance(found, MultiloraError):
            raise found
        self.loaded[version] = path
        return AdapterInfo(
            version=version, path=path, rank=4, target_modules=[], nbytes=1, pages=1, fingerprint=str(found)
        )

    async def unload_adapter(self, version: int) -> None:
        await self._until_open()
        del self.loaded[version]

    async def call(self, message: Callable[[int], Any]) -> Reply:
        await self._until_open()
        self.calls.append(message(len(self.calls) + 1))
        return Reply(call=len(self.calls), pause=PauseState(mode=getattr(self.calls[-1], "mode", None)))

    async def shutdown(self, timeout: float = 60.0) -> None:
        self.closed = True
        if self.alive:
            self.die("the server has shut down")

    async def _until_open(self) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self.gate, self.ended)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not self.alive:
            raise EngineDead("the engine process ended")
