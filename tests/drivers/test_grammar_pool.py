"""Grammars in processes that are killed: what takes too long or too much, or whose client leaves.

Covers `grammar_process.py` too.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Iterator

import psutil
import pytest
import xgrammar
from fakes.tokenizers import byte_level_tokenizer

from multilora.drivers import grammar_pool
from multilora.drivers.grammar_pool import GrammarPool
from multilora.errors import BadRequest, QueueFull
from multilora.front.grammars.compiler import Setup

TOKENIZER = byte_level_tokenizer()
SETUP = Setup(TOKENIZER, TOKENIZER.vocab_size + 7, [1])
SLOW = ("json_schema", json.dumps({"properties": {f"property {i}": {"type": "string"} for i in range(4000)}}))
QUICK = ("regex", "ab?")


class Loop:
    """A pool with its event loop, and the process behind it."""

    def __init__(self, seconds: float = 20.0, nbytes: int = 1 << 30):
        self.runner = asyncio.Runner()
        self.before = {p.pid for p in psutil.Process().children()}
        self.pool = self.run(self._make(seconds, nbytes))

    async def _make(self, seconds: float, nbytes: int) -> GrammarPool:
        return GrammarPool(seconds, nbytes)

    def run(self, work):
        async def limited():
            return await asyncio.wait_for(work, 120)

        return self.runner.run(limited())

    @property
    def process(self) -> psutil.Process | None:
        """The process that forks, once it is there."""
        mine = psutil.Process().children()
        return next((p for p in mine if p.pid not in self.before), None)

    def children(self) -> list[psutil.Process]:
        return self.process.children() if self.process else []

    def compiles_above(self, niceness: int) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return any(child.nice() > niceness for child in self.children())
        return False

    def close(self) -> None:
        self.pool.close()
        self.run(asyncio.sleep(0.1))
        self.runner.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    loop.run(loop.pool.compile(SETUP, *QUICK))
    yield loop
    loop.close()


async def until(condition, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_the_text_is_what_the_engine_compiles(loop):
    found = loop.run(loop.pool.compile(SETUP, "regex", r"\d{3}-[ab]+"))
    info = xgrammar.TokenizerInfo.deserialize_json(found.tokenizer_info)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(xgrammar.Grammar.deserialize_json(found.text)))
    assert matcher.accept_string("123-aab") and matcher.accept_token(1)


def test_a_refusal_comes_back(loop):
    with pytest.raises(BadRequest, match=r"sampling_params\.regex is not a usable grammar") as e:
        loop.run(loop.pool.compile(SETUP, "regex", "(ab"))
    assert e.value.param == "regex"


def test_a_quick_one_does_not_wait_for_a_slow_one(loop):
    async def both() -> None:
        slow = asyncio.create_task(loop.pool.compile(SETUP, *SLOW))
        await until(loop.children)
        await loop.pool.compile(SETUP, *QUICK)
        assert not slow.done()
        slow.cancel()

    loop.run(both())


def test_what_takes_long_steps_back(loop):
    async def watch() -> None:
        slow = asyncio.create_task(loop.pool.compile(SETUP, *SLOW))
        await until(loop.children)
        await until(lambda: loop.compiles_above(loop.process.nice()))
        slow.cancel()

    loop.run(watch())


def test_it_competes_with_the_front_as_a_session_of_its_own(loop):
    assert os.getsid(loop.process.pid) == loop.process.pid != os.getsid(0)


def test_what_nobody_waits_for_is_killed(loop):
    async def leave() -> None:
        slow = asyncio.create_task(loop.pool.compile(SETUP, *SLOW))
        await until(loop.children)
        await asyncio.sleep(0.3)
        slow.cancel()
        await until(lambda: not loop.children())

    loop.run(leave())


def test_the_queue_is_bounded(loop, monkeypatch):
    monkeypatch.setattr(grammar_pool, "MAX_WAITING", 2)

    async def crowd() -> None:
        slow = [asyncio.create_task(loop.pool.compile(SETUP, *SLOW)) for _ in range(6)]
        await until(lambda: len(loop.children()) == grammar_pool.AT_ONCE)
        with pytest.raises(QueueFull):
            await loop.pool.compile(SETUP, *QUICK)
        for one in slow:
            one.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    loop.run(crowd())
    loop.run(loop.pool.compile(SETUP, *QUICK))


@pytest.mark.slow
def test_the_process_is_started_again(loop):
    loop.process.kill()
    loop.run(loop.pool.compile(SETUP, *QUICK))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "says"), [({"seconds": 0.2}, "--grammar-timeout"), ({"nbytes": 24 << 20}, "--grammar-max-bytes")]
)
def test_limits(limits, says):
    loop = Loop(**limits)
    try:
        with pytest.raises(BadRequest, match=says):
            loop.run(loop.pool.compile(SETUP, *SLOW))
        loop.run(loop.pool.compile(SETUP, *QUICK))
    finally:
        loop.close()


@pytest.mark.slow
def test_nothing_is_left_when_it_is_closed():
    loop = Loop()

    async def scenario() -> list[psutil.Process]:
        slow = asyncio.create_task(loop.pool.compile(SETUP, *SLOW))
        await until(loop.children)
        found = [loop.process, *loop.children()]
        loop.pool.close()
        slow.cancel()
        return found

    processes = loop.run(scenario())
    loop.run(until(lambda: not any(p.is_running() and p.status() != "zombie" for p in processes)))
    loop.close()
