"""What the clients of a soak do, and how each request ended.

Adapter `a7` is a copy of one of the demo's adapters, and becomes another one when it is swapped. Its answers are
known (`expected`); while a swap is under way those of both are right. Every request is counted under one ending.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from multilora.demo import PROMPTS, adapter_paths

TOKENS = 16
AT_ONCE = 16
PATHS = {name: str(path) for name, path in adapter_paths().items()}
KINDS = sorted(PATHS)
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS}
BAD = [
    ("/generate", {"text": "x", "sampling_params": {"temperature": -1}}),
    ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": "many"}}),
    ("/generate", {"text": "x", "lora_path": "no such adapter"}),
    ("/generate", {"text": "x" * 50_000}),
    ("/generate", {"text": ["x"], "input_ids": [[1]]}),
    ("/v1/completions", {"prompt": [10**9]}),
    ("/v1/completions", {"prompt": "x", "model": "no such model"}),
    ("/v1/chat/completions", {"messages": "x"}),
    ("/load_lora_adapter", {"lora_name": "bad", "lora_path": "/no/such/path"}),
    ("/unload_lora_adapter", {"lora_name": "no such adapter"}),
]


@dataclass
class Adapter:
    """kinds: of which demo adapters it may be now; watchers: the same for the requests that run on it."""

    name: str
    kinds: set[str]
    watchers: list[set[str]] = field(default_factory=list)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def may_become(self, kind: str) -> None:
        self.kinds.add(kind)
        for seen in self.watchers:
            seen.add(kind)


class WrongEndingError(Exception):
    """A request did not end as it must: the text says how."""


CUT_SECONDS = 10.0
"""A connection may be cut for so long after its front process was killed or stopped."""
UNDER_WAY = ("is being unloaded", "is being replaced")
"""In the message that refuses a change while an earlier one of the same adapter goes on, as it does behind a
connection that was cut. SGLang's format, in which it is said, has no code."""


class Clients:
    """endings: how many requests ended how; wrong: what must not be; front_ended_at: when a front process of several
    was killed or stopped last. pause: seconds between two requests of a client."""

    front_ended_at = float("-inf")

    def __init__(self, http: httpx.AsyncClient, adapters: int, seed: int, pause: float = 0.0):
        self.endings: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.expected: dict[tuple[str | None, str], str] = {}
        self.adapters = [Adapter(f"a{i}", {KINDS[i % len(KINDS)]}) for i in range(adapters)]
        self._http = http
        self._seed = seed
        self._pause = pause

    async def load_all(self) -> None:
        """Load the adapters, and learn the demo adapters' answers, one request at a time."""
        for start in range(0, len(self.adapters), AT_ONCE):
            await asyncio.gather(*(self._load(one) for one in self.adapters[start : start + AT_ONCE]))
        for prompt in PROMPTS:
            for kind, one in [(None, None), *((next(iter(a.kinds)), a) for a in self.adapters[: len(KINDS)])]:
                self.expected[kind, prompt] = await self._answer(prompt, one and one.name)

    async def _load(self, adapter: Adapter) -> None:
        [kind] = adapter.kinds
        answer = await self._post("/load_lora_adapter", {"lora_name": adapter.name, "lora_path": PATHS[kind]})
        assert answer.status_code == 200, answer.text

    async def check_all(self) -> int:
        """Ask every adapter once, when nothing else happens. Returns how many answers were right."""
        at_once = asyncio.Semaphore(AT_ONCE)

        async def right(number: int, adapter: Adapter) -> bool:
            prompt = PROMPTS[number % len(PROMPTS)]
            async with at_once:
                text = await self._answer(prompt, adapter.name)
            if text in {self.expected[kind, prompt] for kind in adapter.kinds}:
                return True
            self.wrong.append(f"{adapter.name} ({adapter.kinds}) when nothing else happened: {text!r}")
            return False

        return sum(await asyncio.gather(*(right(i, one) for i, one in enumerate(self.adapters))))

    async def _answer(self, prompt: str, name: str | None) -> str:
        body = {"text": prompt, "lora_path": name, "sampling_params": GREEDY}
        answer = await self._post("/generate", body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["text"]
        return text

    # ------------------------------------------------------------------ a client

    async def client(self, number: int, stop: asyncio.Event) -> None:
        """One request after another until `stop`."""
        rng = random.Random(f"{self._seed} {number}")
        doings = [self._whole, self._stream, self._chat, self._hang_up, self._bad, self._swap, self._reload]
        while not stop.is_set():
            began = time.monotonic()
            [doing] = rng.choices(doings, weights=[30, 30, 15, 10, 10, 3, 2])
            try:
                ending = await doing(rng)
            except WrongEndingError as e:
                ending = "WRONG"
                self.wrong.append(f"{doing.__name__[1:]}: {e}")
            except httpx.HTTPError as e:  # no answer at all, or a broken one
                ending = self._cut(e, began)
                if not ending:
                    ending = "WRONG"
                    self.wrong.append(f"{doing.__name__[1:]}: {type(e).__name__}: {e}")
            self.endings[f"{doing.__name__[1:]}: {ending}"] += 1
            await asyncio.sleep(self._pause)

    @asynccontextmanager
    async def _chosen(self, rng: random.Random) -> AsyncIterator[tuple[str | None, set[str] | set[None]]]:
        """An adapter's name, or None for the base model, and what it may be until the request ends."""
        if rng.random() < 0.1:
            yield None, {None}
            return
        adapter = rng.choice(self.adapters)
        seen = set(adapter.kinds)
        adapter.watchers.append(seen)
        try:
            yield adapter.name, seen
        finally:
            adapter.watchers[:] = [each for each in adapter.watchers if each is not seen]  # others may be equal

    async def _whole(self, rng: random.Random) -> str:
        prompt = rng.choice(PROMPTS)
        async with self._chosen(rng) as (name, kinds):
            body = {"text": prompt, "lora_path": name, "sampling_params": GREEDY}
            answer = await self._post("/generate", body)
            return self._refusal(answer) or self._judge(answer.json()["text"], prompt, kinds)

    async def _stream(self, rng: random.Random) -> str:
        prompt = rng.choice(PROMPTS)
        async with self._chosen(rng) as (name, kinds):
            fields = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
            return await self._streamed("/v1/completions", fields, name, prompt, kinds)

    async def _streamed(
        self, path: str, fields: dict[str, Any], name: str | None, prompt: str, kinds: set[Any]
    ) -> str:
        text, finishes, done, error = "", 0, 0, None
        async with self._http.stream("POST", path, json=fields | ({"model": name} if name else {})) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._refusal(answer)
            async for line in answer.aiter_lines():
                if done and line:
                    raise WrongEndingError(f"something after the end of a stream: {line}")
                if line == "data: [DONE]":
                    done += 1
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    error = event.get("error", error)
                    for choice in event.get("choices", ()):
                        text += choice.get("text") or ""
                        finishes += choice["finish_reason"] is not None
        if done != 1 or finishes + (error is not None) != 1:
            raise WrongEndingError(f"a stream with {finishes} finish reasons, {error} and {done} [DONE]")
        return self._error(error) if error else self._judge(text, prompt, kinds)

    async def _chat(self, rng: random.Random) -> str:
        async with self._chosen(rng) as (name, _):
            body = {"messages": [{"role": "user", "content": "What colour is the sky?"}], "max_tokens": TOKENS}
            answer = await self._post("/v1/chat/completions", body | ({"model": name} if name else {}))
            if refusal := self._refusal(answer):
                return refusal
            [choice] = answer.json()["choices"]
            if choice["finish_reason"] not in ("stop", "length"):
                raise WrongEndingError(f"finish_reason {choice['finish_reason']}")
            return "answered"

    async def _hang_up(self, rng: random.Random) -> str:
        async with self._chosen(rng) as (name, _):
            body = {"text": rng.choice(PROMPTS), "lora_path": name, "stream": True, "sampling_params": GREEDY}
            async with self._http.stream("POST", "/generate", json=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    return self._refusal(answer)
                async for _ in answer.aiter_raw():
                    break
        return "hung up"

    async def _bad(self, rng: random.Random) -> str:
        path, body = rng.choice(BAD)
        answer = await self._post(path, body)
        if 400 <= answer.status_code < 500:
            return f"{answer.status_code}"
        if refusal := self._refusal(answer):
            return refusal
        raise WrongEndingError(f"{path} {str(body)[:100]}: {answer.status_code}")

    async def _swap(self, rng: random.Random) -> str:
        adapter, kind = rng.choice(self.adapters), rng.choice(KINDS)
        async with adapter.changing:
            adapter.may_become(kind)
            body = {"lora_name": adapter.name, "lora_path": PATHS[kind], "upsert": True}
            if refusal := await self._change("/load_lora_adapter", body):
                return refusal
            adapter.kinds = {kind}
            return "swapped"

    async def _reload(self, rng: random.Random) -> str:
        """Unload it, and load another one under its name."""
        adapter, kind = rng.choice(self.adapters), rng.choice(KINDS)
        async with adapter.changing:
            adapter.may_become(kind)
            for seen in adapter.watchers:
                seen.add("gone")
            adapter.kinds.add("gone")
            refusal = await self._change("/unload_lora_adapter", {"lora_name": adapter.name})
            body = {"lora_name": adapter.name, "lora_path": PATHS[kind], "upsert": True}
            for _ in range(120):
                if not (refused := await self._change("/load_lora_adapter", body)):
                    break
                refusal = refused
                await asyncio.sleep(1)
            else:
                raise WrongEndingError(f"{adapter.name} could not be loaded again for two minutes: {refusal}")
            adapter.kinds = {kind}
            return refusal or "reloaded"

    # ------------------------------------------------------------------ what it got

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self._http.post(path, json=body)

    async def _change(self, path: str, body: dict[str, Any]) -> str:
        """How the server refused, if it did."""
        began = time.monotonic()
        try:
            answer = await self._post(path, body)
        except httpx.HTTPError as e:
            if not (cut := self._cut(e, began)):
                raise
            return cut
        message = answer.json().get("error_message") or ""
        if any(each in message for each in UNDER_WAY):
            if not self._front_ended(began):
                raise WrongEndingError(f"{path}: {message}")
            return "under way"
        return self._refusal(answer)

    def _cut(self, error: httpx.HTTPError, began: float) -> str:
        """That the request's front process has ended, if that explains the error."""
        explained = isinstance(error, httpx.TransportError) and self._front_ended(began)
        return "cut with its front process" if explained else ""

    def _front_ended(self, began: float) -> bool:
        return self.front_ended_at > began - CUT_SECONDS

    def _judge(self, text: str, prompt: str, kinds: set[Any]) -> str:
        if text in {self.expected[kind, prompt] for kind in kinds if kind != "gone"}:
            return "right"
        raise WrongEndingError(f"{kinds} {prompt!r}: {text!r}")

    def _refusal(self, answer: httpx.Response) -> str:
        """How the server refused, if it did. Only what an adapter that is being reloaded or an engine that is being
        started again explain is allowed."""
        if answer.status_code == 200:
            return ""
        error = answer.json()
        return self._error(error.get("error") or {"code": answer.status_code, "message": error.get("error_message")})

    @staticmethod
    def _error(error: dict[str, Any]) -> str:
        if error["code"] in ("model_not_found", "UnknownAdapter", "AdapterNotFound", "AdapterUnloading"):
            return "not loaded"
        if error["code"] in ("EngineRestarting", "QueueFull", "AdapterUnavailable", 503):
            return f"{error['code']}"
        raise WrongEndingError(f"refused: {error}")
