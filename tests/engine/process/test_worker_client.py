"""Two real processes: the client here, the engine behind a socket, over a tiny model; and how each takes the other's
death.

Covers `process/client.py`, `process/worker.py` too.
"""

import asyncio
import contextlib
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cpp import ON_CPU
from fakes.models import make_adapter, make_tiny_model

from multilora.config import Config
from multilora.engine.messages import Finished, Output, Pause, PauseState, Resume, Sleep, StartProfile, Submit, WakeUp
from multilora.engine.process.client import EngineClient
from multilora.engine.process.openmp import SPINS
from multilora.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterNotLoaded,
    BadRequest,
    EngineDead,
    ModelUnsupported,
    MultiloraError,
)
from multilora.params import SamplingParams

SECONDS = 120  # no single wait is longer
LONG = 200  # tokens; the context is 256

Queue = asyncio.Queue[Output]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, adapter/, and adapters that cannot be loaded."""
    root = tmp_path_factory.mktemp("files")
    make_tiny_model(root / "model")
    make_adapter(root / "adapter", root / "model", r=4, target_modules=["q_proj", "v_proj"])
    make_tiny_model(root / "larger", hidden_size=128)
    make_adapter(root / "other", root / "larger", r=4, target_modules=["q_proj"])
    broken = root / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((root / "adapter" / "adapter_config.json").read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    return root


def config(files: Path, **fields: Any) -> Config:
    return Config.make(model_path=str(files / "model"), enable_lora=True, log_level="warning", **fields)


class EngineOnALoop:
    """A client on an event loop of its own, so that tests need not be coroutines."""

    def __init__(self, config: Config):
        self.loop = asyncio.Runner()
        self.serial = itertools.count()
        try:
            self.client = self.run(EngineClient.start(config))
        except BaseException:
            self.loop.close()
            raise

    def run(self, coroutine: Any) -> Any:
        async def within() -> Any:
            return await asyncio.wait_for(coroutine, SECONDS)

        return self.loop.run(within())

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """A plain method of the client, on its loop."""

        async def within() -> Any:
            return function(*args)

        return self.run(within())

    def submit(self, rid: str | None = None, max_new_tokens: int = 8, **fields: Any) -> Queue:
        sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
        fields = {"rid": rid or f"request {next(self.serial)}", "input_ids": [1, 5, 9]} | fields
        message = Submit(sampling=sampling, **fields)
        queue = Queue()
        self.call(self.client.submit, message, queue.put_nowait)
        return queue

    def answer(self, queue: Queue) -> tuple[list[int], Finished]:
        """Every token, and the one ending."""

        async def all_of_it() -> tuple[list[int], Finished]:
            tokens: list[int] = []
            while True:
                output = await queue.get()
                tokens += output.token_ids
                if output.finished is not None:
                    await asyncio.sleep(0.02)
                    assert queue.empty(), "something after the end"
                    return tokens, output.finished

        return self.run(all_of_it())

    def engine(self) -> psutil.Process:
        return psutil.Process(self.client._process.pid)

    def close(self) -> None:
        self.run(self.client.shutdown())
        self.loop.close()


@pytest.fixture(scope="module")
def front(files: Path) -> Iterator[EngineOnALoop]:
    """One engine for the tests that leave it as it was."""
    front = EngineOnALoop(config(files))
    yield front
    front.close()


# ---------------------------------------------------------------------- requests


def test_ready_says_what_the_door_must_know(front: EngineOnALoop) -> None:
    ready = front.client.ready
    assert (ready.context_length, ready.vocab_size, ready.eos_token_ids) == (256, 101, [2])
    assert (ready.device, ready.dtype, ready.attention_backend) == ("cpu", "float32", ON_CPU)
    assert ready.stats.total_pages > 0 and ready.stats.free_pages == ready.stats.total_pages


def test_its_threads_that_wait_sleep_soon(front: EngineOnALoop) -> None:
    found = front.engine().environ()
    assert "OMP_WAIT_POLICY" in found or found["GOMP_SPINCOUNT"] == os.environ.get("GOMP_SPINCOUNT", str(SPINS))


def test_tokens_stream_one_by_one(front: EngineOnALoop) -> None:
    queue = front.submit(max_new_tokens=5)
    outputs = [front.run(queue.get()) for _ in range(5)]
    assert [len(o.token_ids) for o in outputs] == [1] * 5
    assert [o.finished and o.finished.type for o in outputs] == [None] * 4 + ["length"]
    assert outputs[0].prompt_tokens == 3


def test_many_requests_at_once_get_their_own_tokens(front: EngineOnALoop) -> None:
    prompts = [[1, 5 + i, 9] for i in range(6)]
    alone = [front.answer(front.submit(input_ids=p)) for i, p in enumerate(prompts)]
    queues = [front.submit(input_ids=p) for i, p in enumerate(prompts)]
    assert [front.answer(queue) for queue in queues] == alone


def test_abort_ends_a_request(front: EngineOnALoop) -> None:
    queue = front.submit("to abort", max_new_tokens=LONG)
    front.run(queue.get())
    front.call(front.client.abort, "to abort", "enough")
    front.call(front.client.abort, "nobody")
    tokens, finished = front.answer(queue)
    assert (finished.type, finished.message) == ("abort", "enough")
    assert len(tokens) < LONG - 1


def test_finish_drops_a_request_silently(front: EngineOnALoop) -> None:
    queue = front.submit("to drop", max_new_tokens=LONG)
    front.run(queue.get())
    front.call(front.client.finish, "to drop")
    front.call(front.client.abort, "to drop")
    while not queue.empty():
        assert queue.get_nowait().finished is None
    tokens, _ = front.answer(front.submit(max_new_tokens=3))
    assert len(tokens) == 3
    assert queue.empty()


def test_an_error_at_the_door_is_an_ending(front: EngineOnALoop) -> None:
    tokens, finished = front.answer(front.submit(adapters=((999, 1.0),)))
    assert (tokens, finished.type, finished.kind) == ([], "error", "UnknownAdapter")


# ---------------------------------------------------------------------- adapters


def test_load_use_and_unload(front: EngineOnALoop, files: Path) -> None:
    base, _ = front.answer(front.submit())
    info = front.run(front.client.load_adapter(1, str(files / "adapter"), False))
    assert (info.version, info.rank, info.target_modules) == (1, 4, ["q_proj", "v_proj"])
    assert info.nbytes > 0 and info.pages > 0
    adapted, finished = front.answer(front.submit(adapters=((1, 1.0),)))
    assert finished.type == "length" and adapted != base
    front.run(front.client.flush_cache())
    front.run(front.client.unload_adapter(1))
    _, finished = front.answer(front.submit(adapters=((1, 1.0),)))
    assert finished.kind == "UnknownAdapter"


def test_adapter_errors_keep_their_type(front: EngineOnALoop, files: Path) -> None:
    for version, (name, error, says) in enumerate(
        [
            ("missing", AdapterNotFound, "missing"),
            ("broken", AdapterInvalid, "not a safetensors file"),
            ("other", AdapterIncompatible, "q_proj"),
        ],
        start=10,
    ):
        with pytest.raises(error, match=says):
            front.run(front.client.load_adapter(version, str(files / name), False))
    with pytest.raises(AdapterNotLoaded):
        front.run(front.client.unload_adapter(999))
    with pytest.raises(MultiloraError):
        front.run(front.client.load_adapter(20, "x" * (1 << 21), False))
    assert front.answer(front.submit())[1].type == "length"


def test_requests_go_on_while_an_adapter_loads(front: EngineOnALoop, files: Path) -> None:
    async def both() -> tuple[float, float]:
        loading = asyncio.create_task(front.client.load_adapter(30, str(files / "adapter"), False))
        started = time.monotonic()
        queue = Queue()
        sampling = SamplingParams(max_new_tokens=1)
        front.client.submit(Submit(rid="meanwhile", input_ids=[1, 2], sampling=sampling), queue.put_nowait)
        await queue.get()
        first = time.monotonic() - started
        await loading
        return first, time.monotonic() - started

    first, loaded = front.run(both())
    assert first <= loaded
    front.run(front.client.unload_adapter(30))


@pytest.mark.slow
def test_the_loader_may_die_and_the_engine_sleeps_when_idle(front: EngineOnALoop, files: Path) -> None:
    engine = front.engine()
    (loader,) = engine.children()
    loader.kill()
    time.sleep(0.5)
    front.run(front.client.load_adapter(40, str(files / "adapter"), False))
    front.run(front.client.unload_adapter(40))
    time.sleep(0.2)
    before = engine.cpu_times()
    time.sleep(1.0)
    after = engine.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.3


@pytest.mark.slow
def test_while_the_loader_cannot_be_started_what_is_loaded_is_served(front: EngineOnALoop, files: Path) -> None:
    versions = itertools.count(41)

    async def load(kill: bool) -> str:
        """What is said against it, if anything. kill: every loader that comes up meanwhile."""
        version = next(versions)
        loading = asyncio.create_task(front.client.load_adapter(version, str(files / "adapter"), False))
        while kill and not loading.done():
            for loader in front.engine().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    loader.kill()
            await asyncio.sleep(0.02)
        try:
            await loading
        except AdapterError as e:
            return e.message
        await front.client.unload_adapter(version)
        return ""

    front.run(front.client.load_adapter(40, str(files / "adapter"), False))
    end = time.monotonic() + SECONDS
    while "the loader process cannot be started: " not in (said := front.run(load(kill=True))):
        assert time.monotonic() < end, said
    assert "signal 9 (SIGKILL)" in said
    for adapters in ((), ((40, 1.0),)):
        assert front.answer(front.submit(adapters=adapters))[1].type == "length"
    while front.run(load(kill=False)):
        assert time.monotonic() < end
        time.sleep(0.1)
    front.run(front.client.unload_adapter(40))


def test_stats_arrive_when_the_engine_becomes_idle(front: EngineOnALoop) -> None:
    front.answer(front.submit(max_new_tokens=4))
    end = time.monotonic() + SECONDS
    while front.client.stats.running or not front.client.stats.generated_tokens:
        assert time.monotonic() < end
        front.run(asyncio.sleep(0.02))
    stats = front.client.stats
    assert stats.free_pages + stats.kv_pages + stats.prefix_pages + stats.adapter_pages == stats.total_pages
    assert stats.kv_pages == 0


def test_stats_are_true_after_a_call_to_an_idle_engine(front: EngineOnALoop, files: Path) -> None:
    """Nothing runs, before or after it."""

    def become(**expected: Any) -> None:
        end = time.monotonic() + SECONDS
        while any(getattr(front.client.stats, field) != value for field, value in expected.items()):
            assert time.monotonic() < end, front.client.stats
            front.run(asyncio.sleep(0.02))

    front.run(front.client.flush_cache())
    become(prefix_pages=0, running=0, adapters=[])
    front.answer(front.submit(max_new_tokens=40))
    info = front.run(front.client.load_adapter(50, str(files / "adapter"), False))
    front.answer(front.submit(max_new_tokens=40, adapters=((50, 1.0),)))
    become(adapter_pages=info.pages, running=0)
    assert front.client.stats.prefix_pages > 0
    front.run(front.client.unload_adapter(50))
    become(adapter_pages=0, adapters=[])
    front.run(front.client.flush_cache())
    become(prefix_pages=0)


def test_rates_and_step_sizes_arrive_with_the_stats(front: EngineOnALoop) -> None:
    before = sum(front.client.stats.step_tokens)
    front.answer(front.submit(max_new_tokens=20))
    end = time.monotonic() + SECONDS
    while front.client.stats.running or sum(front.client.stats.step_tokens) < before + 20:
        assert time.monotonic() < end
        front.run(asyncio.sleep(0.02))
    assert front.client.stats.gen_throughput > 0


def test_a_profile_is_written_by_the_engine_where_only_this_user_looks(front: EngineOnALoop) -> None:
    path = front.client.profile_root / "run" / "a.trace.json.gz"
    wanted = StartProfile(path=str(path), activities=["CPU", "GPU"], with_stack=False)
    front.run(front.client.start_profile(wanted))
    with pytest.raises(BadRequest, match="running already"):
        front.run(front.client.start_profile(wanted))
    front.answer(front.submit(max_new_tokens=2))
    front.run(front.client.stop_profile())
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["pid"] for event in events if event.get("cat") == "cpu_op"} == {front.engine().pid}
    assert front.client.profile_root.parent.stat().st_mode & 0o077 == 0
    with pytest.raises(BadRequest, match="no profile"):
        front.run(front.client.stop_profile())


# ---------------------------------------------------------------------- ends


@pytest.mark.slow
def test_when_the_engine_is_killed_everyone_hears_at_once(files: Path) -> None:
    front = EngineOnALoop(config(files))
    queues = [front.submit(max_new_tokens=LONG) for i in range(3)]
    front.run(queues[0].get())
    process = front.engine()
    loaders = process.children()

    async def kill_while_loading() -> BaseException:
        loading = asyncio.create_task(front.client.load_adapter(1, str(files / "adapter"), False))
        await asyncio.sleep(0)
        process.send_signal(signal.SIGKILL)
        (error,) = await asyncio.gather(loading, return_exceptions=True)
        return error

    started = time.monotonic()
    assert isinstance(front.run(kill_while_loading()), EngineDead)
    for queue in queues:
        _, finished = front.answer(queue)
        assert (finished.type, finished.kind) == ("error", "EngineDead")
    assert time.monotonic() - started < 20
    assert not front.client.alive
    _, finished = front.answer(front.submit())
    assert finished.kind == "EngineDead"
    with pytest.raises(EngineDead):
        front.run(front.client.unload_adapter(1))
    front.close()
    assert not gone(loaders, SECONDS), "the loader outlives its engine"


def test_when_a_step_fails_only_its_requests_end(front: EngineOnALoop) -> None:
    """A token that the front would never let in makes the forward pass raise, on a device that is sound."""
    right, _ = front.answer(front.submit())
    queues = [front.submit(max_new_tokens=LONG) for i in range(3)]
    front.run(queues[0].get())
    queues.append(front.submit(input_ids=[10**6]))
    for queue in queues:
        _, finished = front.answer(queue)
        assert (finished.type, finished.kind) == ("error", "StepFailed")
        assert "IndexError" in finished.message
    assert front.client.alive
    assert front.answer(front.submit())[0] == right


@pytest.mark.slow
def test_messages_that_cannot_be_read_end_the_engine(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Instead of requests that wait for ever."""
    front = EngineOnALoop(config(files))
    monkeypatch.setattr("multilora.engine.process.client.decode_from_engine", lambda data: 1 / 0)
    _, finished = front.answer(front.submit(max_new_tokens=LONG))
    assert (finished.type, finished.kind) == ("error", "EngineDead")
    assert not front.client.alive
    assert "messages cannot be read" in caplog.text and "ZeroDivisionError" in caplog.text
    front.close()


def test_a_paused_engine_rests_and_says_so(front: EngineOnALoop) -> None:
    client = front.client
    queue = front.submit(max_new_tokens=LONG)
    front.run(queue.get())
    reply = front.run(client.call(lambda call: Pause(call=call, mode="keep", queues=True)))
    assert reply.pause == PauseState(mode="keep")
    end = time.monotonic() + SECONDS
    while client.stats.pause.mode != "keep":
        assert time.monotonic() < end
        front.run(asyncio.sleep(0.02))
    assert client.stats.running == 1
    before = front.engine().cpu_times().user
    front.run(asyncio.sleep(0.5))
    assert front.engine().cpu_times().user - before < 0.1
    late = front.submit(max_new_tokens=2)
    front.run(client.call(Resume))
    assert len(front.answer(late)[0]) == 2
    assert front.answer(queue)[1].type == "length"


@pytest.mark.slow
def test_sleep_gives_memory_back_to_the_system(files: Path) -> None:
    front = EngineOnALoop(config(files, arena_bytes=300 << 20))
    client = front.client
    tokens, _ = front.answer(front.submit())

    def resident() -> int:
        return front.engine().memory_info().rss

    front.run(client.call(lambda call: Sleep(call=call, level=2, tags=["weights", "kv_cache"], mode="abort")))
    _, finished = front.answer(front.submit())
    assert (finished.type, finished.kind) == ("error", "EngineAsleep")
    front.run(client.call(lambda call: WakeUp(call, ["weights", "kv_cache"])))
    awake = resident()
    assert front.answer(front.submit())[0] == tokens
    front.run(client.call(lambda call: Sleep(call=call, level=1, tags=["kv_cache"], mode="keep")))
    assert awake - resident() > 250 << 20
    front.close()


@pytest.mark.slow
def test_shutdown_while_paused_ends_what_is_frozen(files: Path) -> None:
    front = EngineOnALoop(config(files))
    queues = [front.submit(max_new_tokens=LONG) for _ in range(3)]
    front.run(queues[0].get())
    front.run(front.client.call(lambda call: Pause(call=call, mode="keep", queues=True)))
    began = time.monotonic()
    front.run(front.client.shutdown())
    assert time.monotonic() - began < 60
    for queue in queues:
        assert front.answer(queue)[1].type == "abort"
    front.loop.close()


def test_shutdown_drains(front: EngineOnALoop) -> None:
    """The last test of the shared engine. Whatever it said before it ended is heard, however busy the front is."""
    directory, process = front.client._directory.path, front.engine()

    async def shutdown() -> None:
        ending = asyncio.create_task(front.client.shutdown())
        await asyncio.sleep(0)
        while lives(process):
            time.sleep(0.01)  # nothing of this loop runs
        await ending

    queues = [front.submit(max_new_tokens=40, input_ids=[1, 3 + i]) for i in range(10)]
    front.run(shutdown())
    assert front.client._process.returncode == 0
    assert not front.client.alive
    assert not directory.exists()
    for queue in queues:
        outputs = [queue.get_nowait() for _ in range(queue.qsize())]
        assert sum(len(o.token_ids) for o in outputs) == 40
        assert outputs[-1].finished is not None and outputs[-1].finished.type == "length"


@pytest.mark.slow
def test_a_start_that_fails_raises_its_error_and_leaves_nothing(tmp_path: Path) -> None:
    before = psutil.Process().children()
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    with pytest.raises(ModelUnsupported, match="Mamba"):
        EngineOnALoop(Config.make(model_path=str(tmp_path), log_level="error"))
    assert psutil.Process().children() == before


PARENT = """
import asyncio, sys
from multilora.config import Config
from multilora.engine.process.client import EngineClient
from multilora.engine.messages import Submit
from multilora.params import SamplingParams

async def main():
    client = await EngineClient.start(Config.make(model_path=sys.argv[1], enable_lora=True, log_level="error"))
    sampling = SamplingParams(max_new_tokens=200, ignore_eos=True)
    for i in range(200):
        client.submit(Submit(rid=str(i), input_ids=[1, i % 100], sampling=sampling), lambda output: None)
    print("up", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory of a short name: pytest's own, with workers, are too long for a socket in them."""
    with tempfile.TemporaryDirectory(prefix="ml-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "loading", "busy"])
def test_the_engine_ends_with_its_parent(files: Path, short_path: Path, when: str) -> None:
    """And nothing of both is left in TMPDIR."""
    command = [sys.executable, "-c", PARENT, str(files / "model")]
    environment = os.environ | {"TMPDIR": str(short_path)}
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        if when == "busy":
            assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        family = wait_for_family(parent.pid, 1 if when == "starting" else 2)
    finally:
        parent.kill()
        parent.communicate()
    assert not gone(family, SECONDS), "orphans"
    assert list(short_path.iterdir()) == []


def wait_for_family(pid: int, count: int) -> list[psutil.Process]:
    """The engine, and its loader."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        family = psutil.Process(pid).children(recursive=True)
        if len(family) >= count:
            return family
        time.sleep(0.01)
    raise AssertionError("the engine never came")


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for all to end; returns those that have not."""
    return psutil.wait_procs(processes, timeout=seconds)[1]
