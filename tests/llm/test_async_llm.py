"""`AsyncLLM`: answers as they grow, aborts, cancellations, its life. What it shares with the other doors is tested in
`tests/front`.

Covers `online.py` too.
"""

import asyncio
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes.async_engine import InProcessEngine
from fakes.models import make_adapter, make_tiny_model
from fakes.server_app import SECONDS
from fakes.tokenizers import byte_level_tokenizer

from multilora import AsyncLLM
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine
from multilora.errors import AdapterNotFound, AdapterUnloading, BadRequest, ConfigError, UnknownAdapter
from multilora.llm import online

LONG = {"temperature": 0.0, "max_new_tokens": 200, "ignore_eos": True}
SHORT = LONG | {"max_new_tokens": 5}
TEXT = "the cat"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte-level tokenizer, and adapters a and b."""
    path = tmp_path_factory.mktemp("files")
    tokenizer = byte_level_tokenizer()
    make_tiny_model(path / "model", vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=1)
    tokenizer.hf.save_pretrained(path / "model")
    for seed, name in enumerate("ab"):
        make_adapter(path / name, path / "model", seed=seed, r=8, target_modules="all-linear")
    return path


class Running:
    """One AsyncLLM, over an engine in this process, and the loop that it lives on."""

    def __init__(self, files: Path):
        self._loop = asyncio.Runner()
        paths = {name: str(files / name) for name in "ab"}
        self.llm = AsyncLLM(str(files / "model"), lora_paths=paths, device="cpu", max_total_tokens=2048)
        self.run(self.llm.start())
        self.front = self.llm._front

    def run(self, work: Any) -> Any:
        return self._loop.run(asyncio.wait_for(work, SECONDS))

    def at_rest(self) -> None:
        assert self.front.in_flight == 0
        assert [ref.num_requests for ref in self.front.registry.refs()] == [0, 0]

        async def idle() -> None:
            while self.llm._started.engine.engine.busy:
                await asyncio.sleep(0)

        self.run(idle())
        assert self.llm.stats().running == self.llm.stats().waiting == 0

    def close(self) -> None:
        self.run(self.llm.close())
        self._loop.close()


@pytest.fixture(scope="module")
def running(files: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fakes.async_engine.build_engine", partial(build_engine, make_loader=InlineLoader))
        patch.setattr(online, "EngineSupervisor", InProcessEngine)
        running = Running(files)
    yield running
    running.close()


@pytest.fixture
def llm(running: Running) -> Iterator[AsyncLLM]:
    yield running.llm
    running.at_rest()


def test_answers_grow(running: Running, llm: AsyncLLM) -> None:
    async def scenario() -> list[Any]:
        return [a async for a in llm.generate(TEXT, SHORT, "a", request_id="r", return_logprob=True)]

    answers = running.run(scenario())
    assert [len(a.token_ids) for a in answers] == [len(a.logprobs) for a in answers] == [1, 2, 3, 4, 5]
    assert [a.finished for a in answers] == [False] * 4 + [True]
    assert answers[0].finish_reason is None and answers[-1].finish_reason.type == "length"
    for earlier, later in itertools.pairwise(answers):
        assert later.text.startswith(earlier.text)
        assert later.token_ids[:-1] == earlier.token_ids
    assert {a.request_id for a in answers} == {"r"}


def test_samples_are_told_apart(running: Running, llm: AsyncLLM) -> None:
    async def scenario() -> list[Any]:
        return [a async for a in llm.generate(TEXT, SHORT | {"n": 2}, request_id="r") if a.finished]

    assert sorted((a.index, a.request_id) for a in running.run(scenario())) == [(0, "r#0"), (1, "r#1")]


def test_embeddings(running: Running, llm: AsyncLLM) -> None:
    """As LLM's; other texts side by side do not matter."""

    async def scenario() -> list[Any]:
        return await asyncio.gather(
            llm.embed(TEXT, "a"), llm.embed([TEXT, [5, 6, 7]], ["a", None], dimensions=3, pooling="mean")
        )

    one, (first, second) = running.run(scenario())
    assert len(one.embedding) == 64
    assert len(first.embedding) == len(second.embedding) == 3
    assert sum(x * x for x in first.embedding) == pytest.approx(1)
    assert second.prompt_tokens == 3
    with pytest.raises(BadRequest, match="dimensions"):
        running.run(llm.embed(TEXT, dimensions=99))
    running.at_rest()


def test_abort(running: Running, llm: AsyncLLM) -> None:
    async def scenario() -> list[Any]:
        answers = []
        async for answer in llm.generate(TEXT, LONG, "a", request_id="r"):
            answers.append(answer)
            if len(answers) == 1:
                with pytest.raises(BadRequest, match="rid"):
                    await anext(llm.generate(TEXT, LONG, request_id="r"))
                await llm.abort("another")
                await llm.abort("r")
        return answers

    answers = running.run(scenario())
    assert answers[-1].finish_reason.type == "abort" and len(answers[-1].token_ids) < 200


@pytest.mark.parametrize("how", ["cancel", "close", "break"])
def test_who_goes_away_aborts(running: Running, llm: AsyncLLM, how: str) -> None:
    engine = running.front.engine
    aborted: list[str] = []
    abort = engine.abort

    def recorded(rid: str, message: str = "aborted") -> None:
        aborted.append(rid)
        abort(rid, message)

    async def scenario() -> None:
        answers = llm.generate(TEXT, LONG, "a", request_id="r")
        seen = asyncio.Event()

        async def consume() -> None:
            async for _ in answers:
                seen.set()
                if how == "break":
                    break

        task = asyncio.create_task(consume())
        await seen.wait()
        if how == "cancel":
            task.cancel()
        if how in ("break", "cancel"):
            await asyncio.gather(task, return_exceptions=True)
        if how == "close":
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await answers.aclose()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "abort", recorded)
        running.run(scenario())
    assert [rid.partition("@")[0] for rid in aborted] == ["r"]


def test_an_unload_waits_and_a_replacement_does_not(running: Running, llm: AsyncLLM, files: Path) -> None:
    async def all_of(name: str, params: dict[str, Any]) -> list[int]:
        return [a async for a in llm.generate(TEXT, params, name)][-1].token_ids

    async def scenario() -> None:
        await llm.load_lora_adapter("x", str(files / "a"))
        before = await all_of("x", LONG)
        answers = llm.generate(TEXT, LONG, "x")
        await anext(answers)
        info = await llm.load_lora_adapter("x", str(files / "b"), replace=True)
        assert await all_of("x", SHORT) == await all_of("b", SHORT) != before[:5]
        assert len(llm.stats().adapters) == 4, "the old version is still in use"
        assert [a async for a in answers][-1].token_ids == before
        answers = llm.generate(TEXT, LONG, "x")
        await anext(answers)
        unload = asyncio.create_task(llm.unload_lora_adapter("x"))
        while "x" in llm.loaded_adapters():
            await asyncio.sleep(0)
        with pytest.raises(AdapterUnloading, match="being unloaded"):
            await all_of("x", SHORT)
        assert not unload.done()
        unload.cancel()  # whoever asked may go
        [*_, last] = [a async for a in answers]
        assert last.finish_reason.type == "length"
        while running.front.registry.name_of(info.version) is not None:
            await asyncio.sleep(0)
        with pytest.raises(UnknownAdapter):
            await all_of("x", SHORT)
        await llm.load_lora_adapters({"y": str(files / "a"), "z": str(files / "b")})
        assert list(llm.loaded_adapters()) == ["a", "b", "y", "z"]
        for name in "yz":
            await llm.unload_lora_adapter(name)

    running.run(scenario())


def test_one_prompt_at_a_time(running: Running, llm: AsyncLLM) -> None:
    with pytest.raises(BadRequest, match="one prompt"):
        running.run(anext(llm.generate([TEXT, TEXT])))  # type: ignore[list-item]


def test_a_bad_start_leaves_nothing_behind(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    class Engine(InProcessEngine):
        async def shutdown(self, timeout: float = 60.0) -> None:
            ended.append(self)
            await super().shutdown()

    monkeypatch.setattr("fakes.async_engine.build_engine", partial(build_engine, make_loader=InlineLoader))
    monkeypatch.setattr(online, "EngineSupervisor", Engine)
    paths = {"a": str(files / "a"), "x": str(files / "nowhere")}
    llm = AsyncLLM(str(files / "model"), lora_paths=paths, device="cpu", max_total_tokens=512)
    with pytest.raises(AdapterNotFound):
        asyncio.run(llm.start())
    assert len(ended) == 1
    with pytest.raises(RuntimeError, match="not running"):
        llm.stats()


def test_before_the_start_and_with_a_wrong_option(files: Path) -> None:
    llm = AsyncLLM(str(files / "model"))
    for early in (llm.loaded_adapters, llm.stats, lambda: asyncio.run(anext(llm.generate(TEXT)))):
        with pytest.raises(RuntimeError, match="not running"):
            early()
    asyncio.run(llm.close())
    with pytest.raises(ConfigError, match="max_loras_per_batch"):
        AsyncLLM(max_lora_per_batch=1)


@pytest.mark.slow
def test_over_an_engine_process(files: Path) -> None:
    async def scenario() -> None:
        paths = {"a": str(files / "a")}
        async with AsyncLLM(str(files / "model"), lora_paths=paths, device="cpu", log_level="error") as llm:
            with pytest.raises(RuntimeError, match="started already"):
                await llm.start()
            answers = [a async for a in llm.generate(TEXT, SHORT, "a")]
            assert (len(answers), answers[-1].finished) == (5, True)
            with pytest.raises(AdapterNotFound):
                await llm.load_lora_adapter("x", str(files / "nowhere"))
            process = llm._started.engine._latest._process  # type: ignore[attr-defined]
        assert process.returncode == 0

    asyncio.run(asyncio.wait_for(scenario(), 3 * SECONDS))


def test_requests_that_run_go_on_with_an_adapter_that_is_replaced(running: Running, files: Path) -> None:
    async def scenario() -> Any:
        last = None
        async for partial_answer in running.llm.generate(TEXT, LONG, lora_path="a"):
            if last is None:
                info = await running.llm.load_lora_adapter(
                    "a", str(files / "b"), replace=True, allow_update_mid_request=True, weight_version="b"
                )
            last = partial_answer
        return last, info.version

    answer, version = running.run(scenario())
    first, second = answer.weight_versions
    assert (first.start, first.end, second.end) == (0, second.start, 200)
    assert 1 <= second.start < 20
    assert (first.label.lora_version, second.label.lora_version) == (1, version)
    assert (answer.lora_version, answer.weight_version) == (version, "b")
    running.at_rest()
