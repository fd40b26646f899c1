"""What the front needs of an engine, wherever it runs: the shape of `engine.client.EngineClient`.

`testing.FakeEngineClient` is the other implementation. All methods belong to one event loop.
"""

import asyncio
from typing import Protocol

from multilora.engine.messages import AdapterInfo, Output, Ready, Stats, Submit


class Client(Protocol):
    """`ready`: as the engine said at its start. `stats`: the latest. `alive`: False once the engine has ended."""

    ready: Ready
    stats: Stats

    @property
    def alive(self) -> bool: ...

    def submit(self, message: Submit) -> "asyncio.Queue[Output]":
        """Outputs of that rid; the last has `finished` (type error, kind EngineDead, if the engine dies)."""

    def abort(self, rid: str, message: str = "aborted") -> None: ...

    def finish(self, rid: str) -> None:
        """A stop string matched in the front: the request is over, no Output follows."""

    def use_tokenizer(self, info: str) -> None:
        """xgrammar's serialized TokenizerInfo; before the first Submit with a grammar."""

    async def load_adapter(self, version: int, path: str, pinned: bool) -> AdapterInfo:
        """Raises the typed errors of `multilora.errors`."""

    async def unload_adapter(self, version: int) -> None: ...

    async def flush_cache(self) -> None: ...

    async def shutdown(self) -> None:
        """Drain and end."""
