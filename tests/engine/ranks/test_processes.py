"""Real ranks: an engine process and the processes of its other ranks, behind the front's handle. However one of them
ends, every request gets its one ending soon, nobody is left, and another start works.

Covers `ranks/process.py`, `process/local.py` too. MULTILORA_TEST_DEVICE=cuda runs them on two GPUs.
"""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes.models import make_adapter, make_tiny_model

from multilora.config import Config
from multilora.engine.messages import Finished, Output, Submit
from multilora.engine.process.client import EngineClient
from multilora.errors import ConfigError
from multilora.llm.offline import LLM
from multilora.params import SamplingParams

pytestmark = pytest.mark.slow

DEVICE = os.environ.get("MULTILORA_TEST_DEVICE", "cpu")
SECONDS = 120  # no single wait is longer
SOON = 40  # an end takes no longer
WATCHDOG = 2 if DEVICE == "cpu" else 10  # the first steps on a GPU compile kernels
SIZES: dict[str, int] = {}
OPTIONS: dict[str, Any] = {}
LONG = 200
if DEVICE == "cuda":  # what FlashInfer and graphs take, and answers that last for seconds there, too
    SIZES = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 8192}
    OPTIONS = {"dtype": "bfloat16", "arena_bytes": 256 << 20, "max_running_requests": 4}
    LONG = 8000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    make_tiny_model(root / "model", "qwen2", **SIZES)
    make_adapter(
        root / "a", root / "model", r=4, target_modules=["q_proj", "o_proj"], bias="lora_only", use_dora=True
    )
    return root


def config(files: Path, **fields: Any) -> Config:
    fields = {"tp_size": 2, "watchdog_timeout": WATCHDOG, "log_level": "error"} | OPTIONS | fields
    return Config.make(model_path=str(files / "model"), device=DEVICE, enable_lora=True, **fields)


async def answer(
    client: EngineClient, rid: str, tokens: int, version: int | None = None
) -> tuple[list[int], Finished]:
    """All tokens and the one ending."""
    queue: asyncio.Queue[Output] = asyncio.Queue()
    sampling = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    adapters = () if version is None else ((version, 1.0),)
    client.submit(Submit(rid=rid, input_ids=[1, 5, 9], sampling=sampling, adapters=adapters), queue.put_nowait)
    found: list[int] = []
    while True:
        output = await queue.get()
        found += output.token_ids
        if output.finished is not None:
            await asyncio.sleep(0.02)
            assert queue.empty(), "something after the end"
            return found, output.finished


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 3 * SECONDS))


def ranks_of(engine: psutil.Process) -> list[psutil.Process]:
    return [p for p in engine.children() if "multilora.engine.ranks.process" in p.cmdline()]


@pytest.fixture
def own_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where ranks of this test alone have theirs; its path is short, for the sake of sockets."""
    with tempfile.TemporaryDirectory(prefix="ml-") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def test_the_answers_of_one_rank_and_a_clean_end(files: Path, own_directory: Path) -> None:
    async def scenario() -> None:
        found = []
        for ranks in (1, 2):
            client = await EngineClient.start(config(files, tp_size=ranks))
            engine = psutil.Process(client._process.pid)
            children = engine.children()
            assert len(ranks_of(engine)) == ranks - 1
            await client.load_adapter(1, str(files / "a"), False)
            jobs = [answer(client, str(i), 20, version) for i, version in enumerate([None, 1, None, 1])]
            found.append(await asyncio.gather(*jobs))
            await client.shutdown()
            assert client._process.returncode == 0
            assert not psutil.wait_procs(children, SOON)[1]
        assert found[0] == found[1]
        assert found[0][0][0] != found[0][1][0], "the adapter does nothing"

    run(scenario())
    assert not list(own_directory.glob("multilora-ranks-*"))


ENDS: dict[str, Callable[[psutil.Process, psutil.Process], None]] = {
    "a rank is killed": lambda engine, rank: rank.kill(),
    "a rank hangs": lambda engine, rank: rank.suspend(),
    "the engine is killed": lambda engine, rank: engine.kill(),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_request_ends_once_and_nobody_is_left(files: Path, end: str) -> None:
    async def scenario() -> None:
        client = await EngineClient.start(config(files))
        engine = psutil.Process(client._process.pid)
        children = engine.children()
        (rank,) = ranks_of(engine)
        jobs = [asyncio.create_task(answer(client, str(i), LONG)) for i in range(4)]
        while not client.stats.generated_tokens:
            await asyncio.sleep(0.01)
        ENDS[end](engine, rank)
        began = time.monotonic()
        for tokens, finished in await asyncio.gather(*jobs):
            assert (finished.type, finished.kind) == ("error", "EngineDead") and len(tokens) < LONG
        assert time.monotonic() - began < SOON
        assert not client.alive, "what /health looks at"
        assert not psutil.wait_procs(children, SOON)[1], "a process is left"
        await client.shutdown()
        again = await EngineClient.start(config(files))
        assert len((await answer(again, "again", 5))[0]) == 5
        await again.shutdown()

    run(scenario())


def test_an_idle_engine_notices_too(files: Path) -> None:
    async def scenario() -> None:
        client = await EngineClient.start(config(files))
        engine = psutil.Process(client._process.pid)
        (rank,) = ranks_of(engine)
        rank.kill()
        end = time.monotonic() + SOON
        while client.alive:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        assert (await answer(client, "late", 5))[1].kind == "EngineDead"
        await client.shutdown()

    run(scenario())


def test_a_start_that_is_refused_leaves_nobody(files: Path) -> None:
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ConfigError, match="--tp-size 3: q_proj, k_proj, v_proj"):
        run(EngineClient.start(config(files, tp_size=3)))
    assert psutil.Process().children(recursive=True) == before


def test_offline_use(files: Path) -> None:
    options: dict[str, Any] = {"skip_tokenizer_init": True, "device": DEVICE, "lora_paths": {"a": str(files / "a")}}
    found = []
    for ranks in (1, 2):
        with contextlib.closing(LLM(str(files / "model"), tp_size=ranks, **options)) as llm:
            params = {"temperature": 0.0, "max_new_tokens": 8}
            answers = llm.generate([[5, 6, 7], [5, 6, 8]], params, [None, "a"])
            found.append([a.token_ids for a in answers])
    assert found[0] == found[1]
    assert not [p for p in psutil.Process().children() if "multilora.engine.ranks.process" in p.cmdline()]
