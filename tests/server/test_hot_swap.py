"""A name gets other weights while requests run on it: real engine, real adapters that answer differently. In the slow
tier the engine is a process of its own.

Requests in flight end on the weights they began with; every later one has the new ones, and none of the old ones' KV.
"""

import asyncio
import json
import shutil
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes.async_engine import InProcessEngine
from fakes.engine_driver import EngineDriver
from fakes.models import make_adapter, make_tiny_model
from fakes.server_app import LocalServer
from safetensors.torch import load_file

from multilora.adapter_tools.share import SharedAdapter
from multilora.adapters.loading.loader import InlineLoader
from multilora.config import Config
from multilora.engine.build import build_engine
from multilora.engine.process.client import EngineClient

PROMPT = list(range(10, 43))
LONG = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
SHORT = LONG | {"max_new_tokens": 12}
PARTS = [{"name": "swap", "weight": 0.5}, {"name": "other", "weight": 2.0}]
BEFORE, AFTER = {"old": 0.5, "other": 2.0}, {"new": 0.5, "other": 2.0}
MIXES = ["old", "new", "other", BEFORE, AFTER, None]
Scenario = Callable[[LocalServer], Coroutine[Any, Any, None]]


class Files:
    """Three adapters, and what each answers alone."""

    def __init__(self, path: Path):
        self.path = path
        make_tiny_model(path / "model")
        for seed, name in enumerate(("old", "new", "other")):
            make_adapter(path / name, path / "model", seed=seed, r=4, target_modules=["q_proj", "v_proj", "up_proj"])
        alone = EngineDriver(path / "model", {n: path / n for n in ("old", "new", "other")}, disable_radix_cache=True)
        rids = {self._key(mix): alone.submit(PROMPT, mix, **LONG) for mix in MIXES}
        alone.run()
        self._answers = {key: alone.answers[rid].tokens for key, rid in rids.items()}

    @staticmethod
    def _key(mix: Any) -> str:
        return str(mix)

    def right(self, mix: Any, sampling: dict[str, Any] = SHORT) -> list[int]:
        return self._answers[self._key(mix)][: sampling["max_new_tokens"]]


class World:
    """One engine and one server for all tests; each leaves no adapter behind."""

    def __init__(self, files: Files, client: type[EngineClient] | type[InProcessEngine]):
        self._loop = asyncio.Runner()
        options = {"model_path": str(files.path / "model"), "device": "cpu", "log_level": "warning", "page_size": 4}
        self._client = self._run(client.start(Config.make(enable_lora=True, **options)))
        self._server = LocalServer(self._client, None, **options)

    def play(self, scenario: Scenario) -> None:
        self._run(scenario(self._server))
        self._run(self._clean())

    def close(self) -> None:
        self._run(self._client.shutdown())
        self._loop.close()

    async def _clean(self) -> None:
        for name in reversed(list(self._server.registry.loaded())):
            assert (await self._server.send("POST", "/unload_lora_adapter", {"lora_name": name})).status == 200
        await versions(self._server, 0)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def limited() -> Any:
            return await asyncio.wait_for(work, 60)

        return self._loop.run(limited())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("swap"))


@pytest.fixture(scope="module", params=[InProcessEngine, pytest.param(EngineClient, marks=pytest.mark.slow)])
def world(files: Files, request: pytest.FixtureRequest) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fakes.async_engine.build_engine", partial(build_engine, make_loader=InlineLoader))
        world = World(files, request.param)
    yield world
    world.close()


async def load(server: LocalServer, path: Path | list[dict[str, Any]], name: str = "swap") -> None:
    source = path if isinstance(path, list) else str(path)
    body = {"lora_name": name, "lora_path": source, "load_inplace": True}
    answer = await server.send("POST", "/v1/load_lora_adapter", body)
    assert answer.status == 200, answer.text


async def ask(server: LocalServer, lora_path: Any) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt's came from the cache."""
    body = {"input_ids": PROMPT, "sampling_params": SHORT, "lora_path": lora_path}
    answer = await server.send("POST", "/generate", body)
    assert answer.status == 200, answer.text
    return answer.json()["output_ids"], answer.json()["meta_info"]["cached_tokens"]


def stream(server: LocalServer, lora_path: Any) -> Any:
    body = {"input_ids": PROMPT, "sampling_params": LONG, "lora_path": lora_path, "stream": True}
    return server.connect("POST", "/generate", body)


async def rest(connection: Any) -> list[int]:
    frames = (await connection.answer()).frames
    return frames[-1]["output_ids"]


async def versions(server: LocalServer, count: int) -> None:
    """Wait until the engine keeps as many adapters; it says so when it has something to do."""
    while len(server.client.stats.adapters) != count:
        await ask(server, None)


def test_the_adapters_differ(files: Files) -> None:
    assert len({tuple(files.right(mix)) for mix in MIXES}) == len(MIXES)


def test_swap_in_the_middle_of_answers(world: World, files: Files) -> None:
    async def scenario(server: LocalServer) -> None:
        await load(server, files.path / "old")
        assert await ask(server, "swap") == (files.right("old"), 0)
        running = [stream(server, "swap") for _ in range(3)]
        for connection in running:
            assert len((await connection.frame())["output_ids"]) < 100
        await load(server, files.path / "new")
        assert all(not connection.task.done() for connection in running), "the swap came too late to show anything"
        assert await ask(server, "swap") == (files.right("new"), 0), "weights or KV of the old version"
        tokens, cached = await ask(server, "swap")
        assert tokens == files.right("new")
        assert cached == 32
        for connection in running:
            assert await rest(connection) == files.right("old", LONG)
        await versions(server, 1)

    world.play(scenario)


def test_a_trainer_swaps_through_shared_memory(world: World, files: Files) -> None:
    def weights(name: str) -> dict[str, Any]:
        return load_file(files.path / name / "adapter_model.safetensors")

    async def scenario(server: LocalServer) -> None:
        config = json.loads((files.path / "old" / "adapter_config.json").read_text())
        with SharedAdapter(weights("old")) as shared:

            async def send(step: str) -> None:
                body = shared.message("swap", config, weight_version=step)
                assert (await server.send("POST", "/load_lora_adapter_from_tensors", body)).status == 200

            await send("1")
            running = stream(server, "swap")
            await running.frame()
            shared.write(weights("new"))
            await send("2")
            shared.write({name: tensor * 0 for name, tensor in weights("new").items()})  # the memory is its own again
            assert not running.task.done(), "the swap came too late to show anything"
            assert await ask(server, "swap") == (files.right("new"), 0), "weights or KV of the old version"
            old = (await running.answer()).frames[-1]
        assert old["output_ids"] == files.right("old", LONG)
        assert old["meta_info"]["weight_version"] == "1"
        body = {"input_ids": PROMPT, "sampling_params": SHORT, "lora_path": "swap"}
        new = (await server.send("POST", "/generate", body)).json()["meta_info"]
        assert new["weight_version"] == "2" and new["lora_version"] > old["meta_info"]["lora_version"]
        await versions(server, 1)

    world.play(scenario)


def test_the_same_path_with_other_files(world: World, files: Files, tmp_path: Path) -> None:
    async def scenario(server: LocalServer) -> None:
        shutil.copytree(files.path / "old", tmp_path / "a")
        await load(server, tmp_path / "a")
        running = stream(server, "swap")
        await running.frame()
        shutil.rmtree(tmp_path / "a")
        shutil.copytree(files.path / "new", tmp_path / "a")
        await load(server, tmp_path / "a")
        assert await ask(server, "swap") == (files.right("new"), 0)
        assert await rest(running) == files.right("old", LONG)

    world.play(scenario)


def test_unload_and_load_again(world: World, files: Files) -> None:
    async def scenario(server: LocalServer) -> None:
        for name in ("old", "new", "old"):
            await load(server, files.path / name)
            assert await ask(server, "swap") == (files.right(name), 0)
            answer = await server.send("POST", "/unload_lora_adapter", {"lora_name": "swap"})
            assert answer.status == 200

    world.play(scenario)


def test_a_composition_follows_its_parts(world: World, files: Files) -> None:
    async def scenario(server: LocalServer) -> None:
        await load(server, files.path / "old")
        await load(server, files.path / "other", "other")
        await load(server, PARTS, "mix")
        assert await ask(server, "mix") == (files.right(BEFORE), 0)
        assert await ask(server, PARTS) == (files.right(BEFORE), 32), "the same sum, so the same KV"
        running = stream(server, "mix")
        await running.frame()
        await load(server, files.path / "new")
        assert not running.task.done()
        assert await ask(server, "mix") == (files.right(AFTER), 0)
        assert await rest(running) == files.right(BEFORE, LONG)
        await versions(server, 2)
        await load(server, [{"name": "other", "weight": 1}], "mix")
        assert await ask(server, "mix") == (files.right("other"), 0)

    world.play(scenario)
