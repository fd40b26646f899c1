"""Rank 0's handle on the others: how a start fails, how a step fails, and what the host keeps for all ranks.

Ranks are threads here, or less; `test_processes.py` has real ones.

Covers `ranks/follow.py`, `ranks/meeting.py` too.
"""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from fakes.engine_driver import EngineDriver
from fakes.models import make_adapter, make_tiny_model
from fakes.ranks import RankThread, start_thread

from multilora.adapters.loading.loader import InlineLoader
from multilora.config import Config
from multilora.engine import build as build_module
from multilora.engine.build import build_engine
from multilora.engine.build_rank import make_sleep
from multilora.engine.messages import Sleep, WakeUp
from multilora.engine.ranks import follow, lead
from multilora.engine.ranks.messages import Broken, FromRank, Joining, encode, reports_address
from multilora.engine.sleep import DeviceSleep
from multilora.errors import AdapterIncompatible, ConfigError, EngineDead, OutOfMemory


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    make_tiny_model(root / "model")
    make_adapter(root / "a", root / "model", r=4, target_modules=["q_proj", "o_proj"])
    return root


class Corpse:
    """A rank that says what it is given and then has ended."""

    def __init__(self, directory: str, *says: FromRank, code: int | None = 3):
        self._code = code
        self.killed = False
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.connect(reports_address(directory))
        for message in says:
            socket.send(encode(message))
        context.destroy(linger=1000)

    def poll(self) -> int | None:
        return self._code

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float | None = None) -> int:
        return self._code or 0


def build(files: Path, start: lead.StartRank, **options: Any) -> None:
    config = Config.make(model_path=str(files / "model"), device="cpu", **({"tp_size": 2} | options))
    build_engine(config, InlineLoader, start_rank=start)


def test_a_rank_that_ends_at_its_start(files: Path) -> None:
    with pytest.raises(EngineDead, match="rank 1 of 2 ended with code 3"):
        build(files, lambda directory, rank: Corpse(directory))


def test_the_error_of_a_rank_is_the_engines(files: Path) -> None:
    says = Broken(1, "OutOfMemory", "rank 1: the weights of the base model: not enough GPU memory")
    corpses: list[Corpse] = []

    def start(directory: str, rank: int) -> Corpse:
        corpses.append(Corpse(directory, says, code=None))
        return corpses[-1]

    with pytest.raises(OutOfMemory, match="rank 1: the weights"):
        build(files, start)
    assert corpses[0].killed


@pytest.mark.slow
def test_a_rank_that_ends_when_it_should_join(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multilora.engine.ranks.meeting.JOIN_SECONDS", 1.0)
    with pytest.raises((EngineDead, ConfigError), match=r"rank 1 of 2 ended|does not reach"):
        build(files, lambda directory, rank: Corpse(directory, Joining(1)))


def test_heads_that_do_not_divide_are_refused_and_all_ranks_end(files: Path) -> None:
    threads: list[RankThread] = []

    def start(directory: str, rank: int) -> RankThread:
        threads.append(start_thread(directory, rank))
        return threads[-1]

    with pytest.raises(ConfigError, match="--tp-size 3: q_proj, k_proj, v_proj: 4 x 16 columns"):
        build(files, start, tp_size=3)
    assert len(threads) == 2
    for thread in threads:
        thread.wait(10)


def test_a_rank_that_raises_ends_the_engine(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = EngineDriver(files / "model", tp_size=2)
    driver.complete([5, 6, 7], max_new_tokens=2)

    def broken(self: Any, plan: Any) -> None:
        raise ZeroDivisionError("rank 1 cannot")

    monkeypatch.setattr(follow._Follower, "_step", broken)
    driver.submit([5, 6, 8])
    with pytest.raises(EngineDead, match="rank 1: ZeroDivisionError"):
        driver.run()
    with pytest.raises(EngineDead, match="rank 1: ZeroDivisionError"):
        driver.engine.step()
    driver.close()
    assert "rank 1 failed" in caplog.text and "all ranks end" in caplog.text


def test_a_rank_that_hangs_is_noticed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread cannot be killed, so here the rank fails when it is told to."""
    told = threading.Event()
    monkeypatch.setattr(RankThread, "kill", lambda self: told.set())
    driver = EngineDriver(files / "model", tp_size=2, watchdog_timeout=1)
    driver.complete([5, 6, 7], max_new_tokens=2)

    def hangs(self: Any, plan: Any) -> None:
        told.wait(30)
        raise RuntimeError("killed")

    monkeypatch.setattr(follow._Follower, "_step", hangs)
    driver.submit([5, 6, 8])
    with pytest.raises(EngineDead, match=r"rank 1 of 2 has not finished step \d+ within 1 s \(--watchdog-timeout\)"):
        driver.run()
    driver.close()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[DeviceSleep]:
    """What releases the memory of each rank that is built."""
    made: list[DeviceSleep] = []

    def make(*arguments: Any) -> DeviceSleep:
        made.append(make_sleep(*arguments))
        return made[-1]

    monkeypatch.setattr(follow, "make_sleep", make)
    monkeypatch.setattr(build_module, "make_sleep", make)
    return made


def held(sleep: DeviceSleep) -> tuple[int, int]:
    """Bytes of weights and arena that are there."""
    tensors = [sleep._weights._tensors, sleep._arena._tensors]
    weights, arena = (sum(t.untyped_storage().nbytes() for t in each) for each in tensors)
    return weights, arena


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2])
def test_all_ranks_release_their_memory_and_take_it_again(files: Path, sleeps: list[DeviceSleep], level: int) -> None:
    driver = EngineDriver(files / "model", {"a": files / "a"}, tp_size=2, ahead=1)
    expected = [driver.complete([5, 6, 7], name, max_new_tokens=4).tokens for name in (None, "a")]
    before = [held(sleep) for sleep in sleeps]
    assert len(sleeps) == 2 and all(weights and arena for weights, arena in before)
    for call in (10, 20):
        driver.call(Sleep(call=call, level=level, tags=["weights", "kv_cache"], mode=None))
        # On CPU the weights of level 1 stay where they would be kept.
        assert [held(sleep) for sleep in sleeps] == [(weights if level == 1 else 0, 0) for weights, _ in before]
        driver.call(WakeUp(call + 1, ["weights"]))
        assert [held(sleep) for sleep in sleeps] == [(weights, 0) for weights, _ in before]
        driver.call(WakeUp(call + 2, ["kv_cache"]))
        assert [held(sleep) for sleep in sleeps] == before
        assert [driver.complete([5, 6, 7], name, max_new_tokens=4).tokens for name in (None, "a")] == expected
    driver.close()


def test_a_rank_that_does_not_get_its_memory_back_leaves_all_asleep(
    files: Path, sleeps: list[DeviceSleep], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = EngineDriver(files / "model", tp_size=2)
    expected = driver.complete([5, 6, 7], max_new_tokens=4).tokens
    driver.call(Sleep(call=1, level=2, tags=["weights", "kv_cache"], mode=None))
    other = next(sleep for sleep in sleeps if isinstance(sleep._peers, follow._Peers))

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(other._arena, "allocate", full)
        with pytest.raises(OutOfMemory, match="rank 1 does not get its kv_cache back"):
            driver.call(WakeUp(2, ["weights", "kv_cache"]))
    assert all("kv_cache" in sleep.released for sleep in sleeps)
    driver.call(WakeUp(3, ["kv_cache"]))
    assert driver.complete([5, 6, 7], max_new_tokens=4).tokens == expected
    driver.close()


def test_a_pause_is_the_same_on_several_ranks(files: Path) -> None:
    driver = EngineDriver(files / "model", tp_size=2)
    expected = driver.complete([5, 6, 7], max_new_tokens=4).tokens
    driver.call(Sleep(call=2, level=0, tags=[], mode=None))
    driver.call(WakeUp(3, []))
    assert driver.complete([5, 6, 7], max_new_tokens=4).tokens == expected
    driver.close()


def test_the_host_holds_the_pages_of_all_ranks(files: Path) -> None:
    driver = EngineDriver(files / "model", {"a": files / "a"}, tp_size=2)
    info, page_bytes = driver.infos["a"], driver.stats.page_bytes
    assert info.nbytes == 2 * info.pages * page_bytes
    driver.complete([5, 6, 7], "a", max_new_tokens=2)
    (stats,) = driver.stats.adapters
    assert (stats.host_bytes, stats.device_bytes) == (info.nbytes, info.pages * page_bytes)
    driver.close()
    for limits in ({"lora_host_bytes": info.nbytes}, {"lora_device_bytes": info.pages * page_bytes}):
        EngineDriver(files / "model", {"a": files / "a"}, tp_size=2, **limits).close()
        (name, nbytes), *_ = limits.items()
        tight = EngineDriver(files / "model", tp_size=2, **{name: nbytes - 1})
        with pytest.raises(AdapterIncompatible):
            tight.load("a", files / "a")
        tight.close()
