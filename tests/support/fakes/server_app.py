"""The application without a network, for tests: requests as direct ASGI calls whose client can read a stream frame
by frame, and hang up.

Used by this package's tests and by anyone who tests against it; give it a `fakes.models.FakeEngineClient`.
"""

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from multilora.adapters.sources.spool import Spool
from multilora.config import Config
from multilora.drivers.async_driver import AsyncDriver
from multilora.front.records import Records
from multilora.front.tokenizer import Tokenizer
from multilora.lora_path import LoraPath
from multilora.server.app import create_app

SECONDS = 120  # no single wait of a test is longer, on a machine that others use, too


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def error(self) -> Any:
        """The error object, in OpenAI's shape."""
        return self.json()["error"]

    @property
    def frames(self) -> list[Any]:
        """The events of a stream, without the `[DONE]` that must end it."""
        *events, done, rest = self.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", ""), self.text
        return [json.loads(event.removeprefix("data: ")) for event in events]


class Connection:
    """One request under way. Made inside a running event loop."""

    def __init__(self, app: Any, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None):
        self._body = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self._body_read = False
        self._gone = asyncio.Event()
        self._frames: list[bytes] = []  # of a message that had several, still to be asked for
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "headers": [
                (k.lower().encode(), v.encode())
                for k, v in ({"content-type": "application/json"} | (headers or {})).items()
            ],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._sent.put))

    async def _receive(self) -> dict[str, Any]:
        if not self._body_read:
            self._body_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def hang_up(self) -> None:
        self._gone.set()

    async def next(self) -> dict[str, Any]:
        """The next ASGI message of the application."""
        return await asyncio.wait_for(self._sent.get(), SECONDS)

    async def frame(self) -> Any:
        """The next event of a stream, as JSON."""
        while not self._frames:
            message = await self.next()
            if message["type"] == "http.response.body":  # one or several
                self._frames += [e.removeprefix(b"data: ") for e in message["body"].split(b"\n\n") if e]
        return json.loads(self._frames.pop(0))

    async def answer(self) -> Answer:
        """All of what is still to come."""
        await asyncio.wait_for(self.task, SECONDS)
        messages = [self._sent.get_nowait() for _ in range(self._sent.qsize())]
        head: dict[str, Any] = {"status": 0, "headers": []}
        head = next((m for m in messages if m["type"] == "http.response.start"), head)
        body = b"".join(m.get("body", b"") for m in messages)
        return Answer(head["status"], {k.decode(): v.decode() for k, v in head["headers"]}, body)


class LocalServer:
    """An application and its registry. The base model is called `base`, LoRA is on unless the config says not."""

    def __init__(
        self,
        client: Any,
        tokenizer: Tokenizer | None,
        defaults: dict[str, Any] | None = None,
        state: tuple[Records, Spool] | None = None,
        **config: Any,
    ):
        self.config = self.config_of(**config)
        self.client = client
        self.app = create_app(self.config, client, tokenizer, defaults, *reversed(state or (None, None)))
        self.driver: AsyncDriver = self.app.state.driver
        self.registry = self.driver.front.registry

    @staticmethod
    def config_of(**config: Any) -> Config:
        return Config.make(**({"served_model_name": "base", "enable_lora": True} | config))

    def connect(self, method: str, path: str, body: Any = None, **headers: str) -> Connection:
        return Connection(self.app, method, path, body, headers)

    async def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        return await self.connect(method, path, body, **headers).answer()

    def get(self, path: str, **headers: str) -> Answer:
        return run(self.send("GET", path, **headers))

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return run(self.send("POST", path, body, **headers))

    def load(self, *names: str) -> None:
        for name in names:
            run(self.load_from(name, f"/adapters/{name}"))

    async def load_from(self, name: str, path: str, **options: Any) -> None:
        await self.driver.change(self.driver.front.adapters.load(name, path, **options))

    async def load_many(self, paths: list[LoraPath]) -> None:
        """As `serve` does with --lora-paths."""
        await self.driver.change(self.driver.front.adapters.load_many(paths, all_or_none=True))

    @property
    def spool(self) -> Spool:
        return self.driver.front.adapters.spool


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a test's coroutine, in an event loop of its own."""

    async def limited() -> Any:
        return await asyncio.wait_for(work, SECONDS)

    return asyncio.run(limited())
