"""One replica: a whole server, engine and application, whose names are the cluster's. Knows nothing of Ray.

It follows the registry with a question that waits for changes; asking it is also what says that this replica goes by
all before. Requests come as ASGI (`handle`), and what a router wants to know is in `report`.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message

from multilora.adapters.sources.spool import Spool
from multilora.cluster import asgi_exchange
from multilora.cluster.cluster_table import ClusterTable
from multilora.cluster.replica_front import ReplicaFront
from multilora.cluster.route_request import ReplicaReport
from multilora.cluster.shared_records import RegistryCalls, SharedRecords
from multilora.config import Config
from multilora.drivers.async_driver import AsyncDriver
from multilora.engine.messages import ShareService
from multilora.errors import EngineDead, MultiloraError
from multilora.front.tokenizer import Tokenizer
from multilora.server.app import create_app
from multilora.server.request_body import Bodies
from multilora.server.text import load_text

logger = logging.getLogger(__name__)

ENGINE_SECONDS = 5
"""For an engine that has nothing to do any more, until it is killed."""
SHARE_SECONDS = 1.0
"""Between two exchanges of what tenants have been served."""
RETRY_SECONDS = 0.5
"""Before the registry is asked again, after it did not answer."""


@dataclasses.dataclass(frozen=True)
class SizedReport:
    """A replica's report, and the bytes of the adapters in it."""

    report: ReplicaReport
    sizes: dict[str, int]


class ReplicaServer:
    """Made by `start`."""

    def __init__(self, name: str, config: Config, calls: RegistryCalls, engine: Any, app: Any, spool: Spool):
        self.name = name
        self._config, self._calls, self._engine, self._spool = config, calls, engine, spool
        self._app: ASGIApp = app
        self.bodies: Bodies = app.state.bodies
        self._driver: AsyncDriver = app.state.driver
        assert isinstance(self._driver.front, ReplicaFront)
        self._front: ReplicaFront = self._driver.front
        self._following: asyncio.Task[None] | None = None
        self._sharing: asyncio.Task[None] | None = None
        self._open = 0
        self._prompt = 0  # tokens of prompts that are not read yet

    @property
    def open_requests(self) -> int:
        """Requests that have no ending yet."""
        return self._open

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts of which nothing has been answered yet, about."""
        return self._prompt

    @classmethod
    async def start(cls, name: str, config: Config, calls: RegistryCalls, spool: Path) -> "ReplicaServer":
        """Start an engine and join the cluster. spool: a directory of this replica's own, below one that all see."""
        from multilora.engine.process.supervisor import EngineSupervisor

        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        config = dataclasses.replace(config, enable_lora=True, lora_paths=(), state_dir=None)
        kept = Spool(spool)
        loading = asyncio.create_task(asyncio.to_thread(load_text, config))
        engine = await EngineSupervisor.start(kept.admit(config))
        try:
            replica = await cls.join(name, config, calls, engine, *await loading, kept)
        except BaseException:
            await engine.shutdown(0)
            raise
        replica.bodies.process.start()  # ahead of the first large body
        return replica

    @classmethod
    async def join(
        cls,
        name: str,
        config: Config,
        calls: RegistryCalls,
        engine: Any,
        tokenizer: Tokenizer | None,
        defaults: dict[str, Any],
        spool: Spool,
    ) -> "ReplicaServer":
        """Join the cluster with an engine that runs."""
        table, asked = ClusterTable(), time.monotonic()
        table.apply(await calls.join(name))
        records = SharedRecords(table, calls, asyncio.get_running_loop())
        app = create_app(config, engine, tokenizer, defaults, spool, records, front_type=ReplicaFront)
        replica = cls(name, config, calls, engine, app, spool)
        await replica._begin(asked)
        return replica

    async def _begin(self, asked: float) -> None:
        copies, table = self._front.copies, self._front.copies.table
        await self._driver.change(self._front.load_at_start())
        copies.heard = asked
        self._following = asyncio.create_task(self._follow())
        if self._config.auth_file is not None:
            self._sharing = asyncio.create_task(self._share())
        pinned = [record.name for record in table.records.values() if record.pinned]
        for name in pinned:
            try:
                await self._driver.change(copies.hold([name]))
            except MultiloraError as e:
                logger.error("pinned adapter %r is not here: %s", name, e)

    async def _follow(self) -> None:
        """Ask for changes, for ever."""
        copies = self._front.copies
        while True:
            asked = time.monotonic()
            try:
                change = await self._calls.changes(self.name, copies.table.seq)
            except MultiloraError as e:
                logger.warning("the cluster's registry does not answer: %s", e)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if change is not None:
                await self._driver.change(copies.apply(change))
            copies.heard = asked

    async def _share(self) -> None:
        """Charge the tenants here for what other replicas serve them, for ever."""
        elsewhere, served = dict[str, float](), Counter[str]()
        while True:
            await asyncio.sleep(SHARE_SECONDS)
            try:
                reply = await self._engine.call(partial(ShareService, elsewhere=elsewhere))
                elsewhere = {}
                served.update(reply.served)
                elsewhere = await self._calls.share(self.name, dict(served))
                served.clear()
            except MultiloraError as e:
                logger.debug("tenants' counters are this replica's own for now: %s", e)

    async def handle(
        self, scope: dict[str, Any], body: bytes, prompt: int = 0
    ) -> AsyncGenerator[list[Message], None]:
        """What the application answers. Closing the generator hangs up. prompt: tokens to read, about."""
        self._open += 1
        self._prompt += prompt
        try:
            async with contextlib.aclosing(asgi_exchange.run(self._app, scope, body)) as pieces:
                async for some in pieces:
                    if prompt and asgi_exchange.answers(some):
                        self._prompt, prompt = self._prompt - prompt, 0
                    yield some
        finally:
            self._open -= 1
            self._prompt -= prompt

    def report(self) -> SizedReport:
        """What this replica holds and has to do."""
        device, host, sizes = dict[str, int](), dict[str, int](), dict[str, int]()
        for adapter in self._engine.stats.adapters:
            name = self._front.registry.name_of(adapter.version)
            version = self._front.copies.version_here(name) if name is not None else 0
            if name is None or not version:
                continue
            sizes[name] = adapter.device_bytes or adapter.host_bytes
            if adapter.level == "device":
                device[name] = version
            elif adapter.level == "host":
                host[name] = version
        limits = self._config.lora_device_bytes or 0, self._config.lora_host_bytes or 0
        room = max(limits) if all(limits) else 0  # what is on the device is mostly in host memory, too
        return SizedReport(ReplicaReport(float(self._open), 1.0, device, host, room, self._prompt), sizes)

    def pressure(self) -> float:
        """Part of the places for adapters on the device that are in use by requests, 0 to 1 or a little more."""
        stats = self._engine.stats
        used = sum(bool(adapter.running or adapter.waiting) for adapter in stats.adapters)
        return used / stats.slots_total if stats.slots_total else 0.0

    def check(self) -> None:
        """Raises EngineDead once the engine has ended for good, or nobody follows the registry any more."""
        if not self._engine.alive:
            raise EngineDead("the engine of this replica has ended")
        if self._following is None or self._following.done():
            raise EngineDead("this replica does not follow the registry any more")

    async def close(self) -> None:
        """Serve nothing any more; what runs has ended, or is cut off."""
        for task in (self._following, self._sharing):
            if task is not None:
                task.cancel()
        with contextlib.suppress(MultiloraError):
            await self._calls.leave(self.name)
        self._driver.stop()
        await self._engine.shutdown(ENGINE_SECONDS)
        self._spool.close()
