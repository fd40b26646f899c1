"""An engine driven by hand, for tests: no process, no threads, one step at a time, its books checked after each.

Owns what came out of the engine, request by request, and checks that each has exactly one ending. Used by this
package's tests and by anyone who tests against it.
"""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fakes.ranks import start_thread
from fakes.tiers import FakeCopier
from multilora.adapters.loading.loader import InlineLoader
from multilora.config import Config
from multilora.engine.build import build_engine, choose_device
from multilora.engine.engine import Engine
from multilora.engine.messages import (
    Abort,
    AdapterInfo,
    AdapterSwitch,
    Finish,
    Finished,
    LoadAdapter,
    Output,
    Outputs,
    ReplaceAdapter,
    Reply,
    Stats,
    Submit,
    TopLogprobs,
    UnloadAdapter,
)
from multilora.engine.ranks.lead import start_process
from multilora.errors import from_wire
from multilora.memory.cached_block import HOLE
from multilora.memory.page_pool import PageKind
from multilora.params import SamplingParams


@dataclass
class Answer:
    """All outputs of one request, put together. `finished` None: not ended, or dropped by `finish`."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    input_logprobs: list[float | None] | None = None
    input_top_logprobs: list[TopLogprobs | None] | None = None
    cached_tokens: int = 0
    finished: Finished | None = None
    switches: list[AdapterSwitch] = field(default_factory=list)

    def add(self, output: Output) -> None:
        assert self.finished is None, f"request {output.rid}: an output after its end"
        if output.switch is not None:
            self.switches.append(output.switch)
            return
        self.tokens += output.token_ids
        self.logprobs += [x.logprob for x in output.logprobs]
        self.top_logprobs += [x.top for x in output.logprobs]
        if output.input_logprobs:
            assert self.input_logprobs is None, f"request {output.rid}: prompt logprobs came twice"
            self.input_logprobs = [x and x.logprob for x in output.input_logprobs]
            self.input_top_logprobs = [x and x.top for x in output.input_logprobs]
        self.cached_tokens = output.cached_tokens
        self.finished = output.finished


DEVICE = os.environ.get("MULTILORA_TEST_DEVICE", "cpu")
"""Where tests of the engine run: `make test-gpu` runs those that compare with PEFT on the GPU too, in fp32."""
ATTENTION = os.environ.get("MULTILORA_TEST_ATTENTION", "auto")
"""The attention backend that they take; on a GPU `auto` is `triton` in fp32."""


class CountingClock:
    """Each reading is a tenth of a millisecond after the one before, so that what the engine decides by the time that
    steps and copies take is the same on a machine of any speed."""

    def __init__(self) -> None:
        self._now = time.monotonic()

    def __call__(self) -> float:
        self._now += 1e-4
        return self._now


class Stepper:
    """Steps an engine and hands on what it says. Subclasses say what becomes of it."""

    engine: Engine

    def step(self, count: int = 1) -> None:
        """Steps of the engine, its books checked after each."""
        for _ in range(count):
            for message in self.engine.step():
                match message:
                    case Outputs(items):
                        for output in items:
                            self.take(output)
                    case Reply():
                        self.reply(message)
            self.after_step()
            self.check()

    def run(self, max_steps: int = 5000) -> None:
        """Step until nothing is left to do."""
        while self.engine.busy:
            assert max_steps > 0, "the engine does not come to an end"
            max_steps -= 1
            self.step()

    def take(self, output: Output) -> None: ...

    def reply(self, reply: Reply) -> None: ...

    def after_step(self) -> None: ...

    def check(self) -> None:
        self.engine.check()


class EngineDriver(Stepper):
    """Keyword arguments are fields of `Config`; adapters: name → directory, loaded at once. late: copies of adapters
    to the device are found done so many steps after their start; None: as they are. Ranks of a `tp_size` over 1 are
    threads, on CUDA processes.

    `answers`: rid → Answer; `infos`: name → AdapterInfo; `drafted`, `accepted`: tokens of drafts, and the right ones.
    """

    def __init__(
        self,
        model_path: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        ahead: int | None = None,
        late: int | None = None,
        **options: Any,
    ):
        defaults: dict[str, Any] = {"model_path": str(model_path), "device": DEVICE, "enable_lora": True}
        defaults["attention_backend"] = ATTENTION
        self._on_gpu = choose_device(options.get("device", DEVICE)).type == "cuda"
        if self._on_gpu and "max_total_tokens" not in options:
            defaults["arena_bytes"] = 1 << 28  # several engines share the device
        config = Config.make(**(defaults | options))
        make_copier = None if late is None else partial(FakeCopier, delay=lambda: late)
        start_rank = start_process if self._on_gpu else start_thread
        self.engine = build_engine(config, InlineLoader, make_copier, ahead, start_rank, clock=CountingClock())
        self.answers: dict[str, Answer] = {}
        self.infos: dict[str, AdapterInfo] = {}
        self.drafted = self.accepted = 0
        self._dropped: set[str] = set()
        self._replies: dict[int, Reply] = {}
        self._calls = 0
        for name, path in (adapters or {}).items():
            self.load(name, path)

    # ------------------------------------------------------------------ requests

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | Mapping[str, float] | None = None,
        *,
        rid: str | None = None,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        grammar: str | None = None,
        **sampling: Any,
    ) -> str:
        """Greedy, 12 new tokens, unless `sampling` says otherwise. adapter: a name, or name → weight. Returns the
        request's id."""
        rid = rid or str(len(self.answers))
        parts = {adapter: 1.0} if isinstance(adapter, str) else adapter or {}
        self.answers.setdefault(rid, Answer())
        message = Submit(
            rid=rid,
            input_ids=list(prompt),
            sampling=SamplingParams(**({"temperature": 0.0, "max_new_tokens": 12} | sampling)),
            adapters=tuple((self.infos[name].version, weight) for name, weight in parts.items()),
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            grammar=grammar,
        )
        self.engine.handle(message)
        return rid

    def abort(self, rid: str) -> None:
        self.engine.handle(Abort(rid))

    def finish(self, rid: str) -> None:
        """As the front does when it has found a stop string."""
        self._dropped.add(rid)
        self.engine.handle(Finish(rid))

    def take(self, output: Output) -> None:
        self.drafted += output.drafted
        self.accepted += output.accepted
        self.answers[output.rid].add(output)

    def reply(self, reply: Reply) -> None:
        self._replies[reply.call] = reply

    def after_step(self) -> None:
        if not self.engine.running and (self._on_gpu or self.engine.busy):
            time.sleep(0.001)  # a copy may be on its way, or a grammar is being compiled

    def run(self, max_steps: int = 5000) -> None:
        """Step until nothing is left to do, then check that the engine is at rest."""
        super().run(max_steps)
        self.check_at_rest()

    def complete(
        self, prompt: Sequence[int], adapter: str | Mapping[str, float] | None = None, **kwargs: Any
    ) -> Answer:
        """Submit and run."""
        rid = self.submit(prompt, adapter, **kwargs)
        self.run()
        return self.answers[rid]

    # ------------------------------------------------------------------ calls

    def load(self, name: str, path: str | Path, *, pinned: bool = False) -> AdapterInfo:
        """Under the next version. Raises the engine's error."""
        self._calls += 1
        reply = self.call(LoadAdapter(call=self._calls, version=self._calls, path=str(path), pinned=pinned))
        assert reply.info is not None
        self.infos[name] = reply.info
        return reply.info

    def replace(self, name: str, by: str) -> None:
        """Requests on the one adapter go on with the other from the next step on. The first is unloaded then."""
        old, new = self.infos.pop(name).version, self.infos[by].version
        self._calls += 2
        self.engine.handle(ReplaceAdapter(self._calls - 1, old, new))
        self.engine.handle(UnloadAdapter(self._calls, old))

    def unload(self, name: str) -> None:
        self._calls += 1
        self.call(UnloadAdapter(self._calls, self.infos.pop(name).version))

    def call(self, message: Any) -> Reply:
        """Send a call and step until its reply has come. Raises the engine's error."""
        self._calls = max(self._calls, message.call)
        self.engine.handle(message)
        while message.call not in self._replies:
            self.step()
        reply = self._replies.pop(message.call)
        if not reply.ok:
            raise from_wire(reply.kind, reply.message)
        return reply

    # ------------------------------------------------------------------ books

    @property
    def stats(self) -> Stats:
        return self.engine.report.stats()

    @property
    def evictions(self) -> int:
        """Of adapters, from the device."""
        return sum(a.evictions for a in self.stats.adapters)

    def check(self) -> None:
        """The engine's own books, and that pages and adapters belong to those who run."""
        engine = self.engine
        engine.check()
        scheduler, pool = engine.scheduler, engine.scheduler.kv.pool
        held = {page for request in scheduler.running for page in request.table.pages if page != HOLE}
        assert all(pool.kind(page) is PageKind.KV for page in held)
        assert len(held) == pool.count(PageKind.KV), "KV pages that no request holds"
        assert scheduler.unfinished == len(scheduler.running) + len(scheduler.waiting)
        for requests, count in ((scheduler.running, "refs"), (scheduler.waiting, "waiting")):
            expected = Counter(version for request in requests for version in request.versions)
            found = {a.version: getattr(a, count) for a in engine.adapters.loaded() if getattr(a, count)}
            assert found == expected, f"{count} of an adapter are miscounted"

    def check_at_rest(self) -> None:
        """Every request has had its one ending, and nobody holds anything."""
        open_ = {rid for rid, answer in self.answers.items() if answer.finished is None}
        assert open_ <= self._dropped, f"requests without an ending: {sorted(open_ - self._dropped)}"
        stats = self.stats
        assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
        assert stats.free_pages + stats.prefix_pages + stats.adapter_pages == stats.total_pages

    def close(self) -> None:
        self.engine.close()
