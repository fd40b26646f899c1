"""Pausing and sleeping: no token changes, every request ends once, memory really goes and comes back.

Covers `pause_control.py`, `scheduling/pause.py`, `sleep.py` too.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.engine_driver import EngineDriver
from fakes.models import make_adapter, make_tiny_model
from safetensors.torch import load_file, save_file

from multilora.engine.messages import (
    FlushCache,
    LoadAdapter,
    MemoryTag,
    Pause,
    PauseMode,
    PauseState,
    Reply,
    Resume,
    Sleep,
    WakeUp,
)
from multilora.layers.weights.onednn import OneDnnWeight

BOTH: list[MemoryTag] = ["weights", "kv_cache"]
PROMPTS = [[5 + (7 * i + j) % 90 for j in range(3 + 5 * i)] for i in range(6)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model; adapters a and b of low rank, c with DoRA."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("files")
    make_tiny_model(path / "model")
    for seed, name in enumerate("abc"):
        options: dict[str, Any] = {"use_dora": True} if name == "c" else {}
        make_adapter(
            path / name, path / "model", seed=seed, r=8, lora_alpha=16, target_modules="all-linear", **options
        )
    yield path
    torch.set_num_threads(threads)


class PausedDriver(EngineDriver):
    """Keeps the replies to pauses."""

    def __init__(self, files: Path, names: str = "ab", **options: Any):
        self.said: list[Reply] = []
        super().__init__(files / "model", {name: files / name for name in names}, **options)

    def reply(self, reply: Reply) -> None:
        self.said.append(reply)
        super().reply(reply)

    def pause(self, mode: PauseMode = "keep", *, queues: bool | None = None) -> None:
        waits = mode in ("keep", "retract") if queues is None else queues
        self.engine.handle(Pause(call=0, mode=mode, queues=waits))

    def resume(self) -> None:
        self.engine.handle(Resume(0))

    def sleep(self, level: int = 1, mode: PauseMode | None = "keep", tags: list[MemoryTag] | None = None) -> None:
        self.engine.handle(Sleep(call=0, level=level, mode=mode, tags=BOTH if tags is None else tags))

    def wake_up(self, tags: list[MemoryTag] | None = None) -> None:
        self.engine.handle(WakeUp(0, BOTH if tags is None else tags))

    def settle(self) -> Reply:
        """Step until the last call is answered."""
        self.said.clear()
        for _ in range(100):
            self.step()
            if self.said:
                return self.said[-1]
        raise AssertionError("a call is not answered")

    def begin_all(self) -> None:
        for i, prompt in enumerate(PROMPTS):
            adapter = [None, "a", "b"][i % 3]
            sampling: dict[str, Any] = {"temperature": 0.0} if i % 2 else {"temperature": 0.9, "sampling_seed": i}
            self.submit(prompt, adapter, rid=f"r{i}", max_new_tokens=12, ignore_eos=True, **sampling)

    def all_tokens(self) -> list[list[int]]:
        assert all(a.finished is not None and a.finished.type == "length" for a in self.answers.values())
        return [self.answers[f"r{i}"].tokens for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def expected(files: Path) -> list[list[int]]:
    driver = PausedDriver(files, page_size=4)
    driver.begin_all()
    driver.run()
    return driver.all_tokens()


# ---------------------------------------------------------------------- nothing changes


COURSES = [(seed, *course) for seed in range(3) for course in ((0, None), (1, None), (1, 2))]
QUICK = (COURSES[0], COURSES[4], COURSES[8])
"""Every seed, with every one of the courses once."""


@pytest.mark.parametrize(
    ("seed", "ahead", "late"),
    [pytest.param(*course, marks=() if course in QUICK else pytest.mark.slow) for course in COURSES],
)
def test_pauses_at_random_steps_change_no_token(
    files: Path, expected: list[list[int]], seed: int, ahead: int, late: int | None
) -> None:
    rng = random.Random(seed)
    options: dict[str, Any] = {"page_size": 4, "chunked_prefill_size": 16, "max_total_tokens": 1200}
    driver = PausedDriver(files, ahead=ahead, late=late, **options)
    driver.begin_all()
    pauses = 0
    while driver.engine.busy:
        driver.step(rng.randrange(4))
        if rng.random() < 0.5:
            pauses += 1
            kind = rng.choice(["keep", "retract", "sleep", "discard", "flush"])
            if kind == "flush":
                driver.engine.handle(FlushCache(0, retract=True))
                continue
            if kind in ("sleep", "discard"):
                driver.sleep(1 if kind == "sleep" else 2)
            else:
                driver.pause("retract" if kind == "retract" else "keep")
            assert driver.settle().ok
            told = sum(len(answer.tokens) for answer in driver.answers.values())
            driver.step(3)
            assert sum(len(answer.tokens) for answer in driver.answers.values()) == told
            if kind in ("sleep", "discard"):
                driver.wake_up()
            else:
                driver.resume()
            assert driver.settle().pause == PauseState()
    assert pauses
    assert driver.all_tokens() == expected


def test_a_paused_engine_rests(files: Path) -> None:
    driver = PausedDriver(files)
    driver.begin_all()
    driver.step(4)
    assert driver.engine.running
    driver.pause()
    assert driver.settle().pause == PauseState(mode="keep")
    assert not driver.engine.running and not driver.engine.busy
    assert driver.stats.pause == PauseState(mode="keep")
    assert driver.stats.running == len(PROMPTS)
    launched = driver.stats.steps
    driver.submit(PROMPTS[0], "a", rid="late", max_new_tokens=2, ignore_eos=True)
    driver.step(5)
    assert (driver.stats.steps, driver.stats.waiting) == (launched, 1)
    driver.resume()
    driver.run()
    assert {answer.finished.type for answer in driver.answers.values() if answer.finished} == {"length"}
    assert len(driver.answers) == len(PROMPTS) + 1


def test_adapters_come_and_go_while_requests_are_frozen(files: Path) -> None:
    driver = PausedDriver(files, "a", max_loaded_loras=3)
    driver.submit(PROMPTS[1], "a", rid="r", max_new_tokens=6, ignore_eos=True)
    driver.step(3)
    driver.pause()
    driver.settle()
    driver.load("b", files / "b", pinned=True)
    driver.load("c", files / "c")
    driver.unload("c")
    driver.resume()
    driver.run()
    assert driver.answers["r"].finished is not None
    assert driver.complete(PROMPTS[2], "b", max_new_tokens=2, ignore_eos=True).tokens


def test_wait_lets_requests_finish_and_takes_no_new_ones(files: Path, expected: list[list[int]]) -> None:
    driver = PausedDriver(files)
    driver.begin_all()
    driver.step(2)
    driver.pause("wait")
    driver.submit(PROMPTS[0], rid="late", max_new_tokens=2)
    assert driver.settle().pause == PauseState(mode="wait")
    refused = driver.answers.pop("late").finished
    assert refused is not None and (refused.type, refused.kind) == ("error", "EnginePaused")
    assert driver.all_tokens() == expected


def test_a_pause_that_waits_can_be_resumed(files: Path, expected: list[list[int]]) -> None:
    driver = PausedDriver(files)
    driver.begin_all()
    driver.pause("wait")
    driver.step(2)
    driver.said.clear()
    driver.resume()
    driver.step()
    assert [reply.ok for reply in driver.said] == [False, True]
    driver.run()
    assert driver.all_tokens() == expected


@pytest.mark.parametrize("queues", [False, True])
def test_abort_ends_everything_once(files: Path, queues: bool) -> None:
    driver = PausedDriver(files)
    driver.begin_all()
    driver.step(3)
    driver.pause("abort", queues=queues)
    driver.settle()
    assert {answer.finished.type for answer in driver.answers.values() if answer.finished} == {"abort"}
    assert len(driver.answers) == len(PROMPTS)
    driver.submit(PROMPTS[0], rid="late", max_new_tokens=2, ignore_eos=True)
    driver.step(2)
    late = driver.answers.get("late")
    if queues:
        assert late is None or late.finished is None
        driver.pause("abort")
        driver.settle()
        assert driver.answers["late"].finished is not None and driver.answers["late"].finished.type == "abort"
    else:
        assert late is not None and late.finished is not None and late.finished.kind == "EnginePaused"


def test_pausing_again_changes_the_mode(files: Path, expected: list[list[int]]) -> None:
    driver = PausedDriver(files)
    driver.begin_all()
    driver.step(2)
    for mode in ("keep", "keep", "retract"):
        driver.pause(mode)
        assert driver.settle().pause == PauseState(mode=mode)
    assert driver.stats.running == 0
    driver.resume()
    driver.settle()
    driver.resume()
    assert driver.settle().ok
    driver.run()
    assert driver.all_tokens() == expected


def test_a_request_can_be_aborted_while_paused(files: Path) -> None:
    driver = PausedDriver(files)
    driver.begin_all()
    driver.step(3)
    driver.pause()
    driver.settle()
    driver.abort("r1")
    driver.step()
    assert driver.answers["r1"].finished is not None and driver.answers["r1"].finished.type == "abort"
    driver.engine.pauses.abort_frozen()
    driver.step()
    assert all(answer.finished and answer.finished.type == "abort" for answer in driver.answers.values())
    assert not driver.engine.busy


# ---------------------------------------------------------------------- sleep


def arena_of(driver: EngineDriver) -> torch.Tensor:
    return driver.engine.runner._attention.kv_views[0][0]  # type: ignore[attr-defined, no-any-return]


def weight_of(driver: EngineDriver) -> torch.Tensor:
    return next(iter(driver.engine.runner._model.parameters()))


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_releases_memory_and_wake_up_brings_it_back(files: Path, level: int) -> None:
    driver = PausedDriver(files)
    before = driver.complete(PROMPTS[4], "a", max_new_tokens=5, ignore_eos=True)
    size, weights = nbytes(arena_of(driver)), nbytes(weight_of(driver))
    assert driver.stats.adapter_pages and driver.stats.prefix_pages
    driver.sleep(level)
    asleep = PauseState(mode="keep", sleeping=True, level=level, released=["kv_cache", "weights"])
    assert driver.settle().pause == asleep
    assert driver.stats.pause == asleep
    assert nbytes(arena_of(driver)) == 0
    assert nbytes(weight_of(driver)) == (0 if level == 2 else weights)
    stats = driver.stats
    assert stats.free_pages == stats.total_pages
    assert {adapter.level for adapter in stats.adapters} == {"host"}
    driver.submit(PROMPTS[0], rid="late", max_new_tokens=2)
    driver.step()
    late = driver.answers["late"].finished
    assert late is not None and late.kind == "EngineAsleep"
    driver.wake_up()
    assert driver.settle().pause == PauseState()
    assert nbytes(arena_of(driver)) == size
    after = driver.complete(PROMPTS[4], "a", max_new_tokens=5, ignore_eos=True)
    assert (after.tokens, after.cached_tokens) == (before.tokens, 0)


@pytest.mark.parametrize("quantization", ["fp8", "bitsandbytes"])
def test_a_quantised_model_wakes_up_as_it_was(files: Path, quantization: str) -> None:
    """Its weights discarded and read again, its KV cache in 8 bit."""
    pytest.importorskip("bitsandbytes")
    driver = PausedDriver(files, quantization=quantization, kv_cache_dtype="fp8")
    before = driver.complete(PROMPTS[4], "a", max_new_tokens=5, ignore_eos=True)
    driver.sleep(2)
    driver.settle()
    assert nbytes(weight_of(driver)) == 0
    driver.wake_up()
    assert driver.settle().pause == PauseState()
    assert driver.complete(PROMPTS[4], "a", max_new_tokens=5, ignore_eos=True).tokens == before.tokens


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def hole_in_the_heap(part: int, count: int) -> torch.Tensor:
    """Have the allocator keep so much free memory, below what is returned."""
    first = torch.ones(part, dtype=torch.uint8)
    del first  # from now on parts of this size are no longer mapped one by one
    parts = [torch.ones(part, dtype=torch.uint8) for _ in range(count)]
    above = torch.ones(1 << 20, dtype=torch.uint8)
    parts.clear()
    return above


def test_memory_goes_back_to_the_system(files: Path) -> None:
    before = resident()
    above = hole_in_the_heap(16 << 20, 20)
    driver = PausedDriver(files, arena_bytes=256 << 20)
    torch.empty(0, dtype=torch.uint8).set_(arena_of(driver).untyped_storage()).fill_(1)
    assert resident() - before > 250 << 20
    driver.sleep()
    driver.settle()
    assert resident() - before < 64 << 20, "neither the arena nor the hole is kept"
    driver.wake_up()
    driver.settle()
    assert driver.complete(PROMPTS[1], "a", max_new_tokens=2, ignore_eos=True).tokens
    del above


def test_waking_up_part_by_part(files: Path) -> None:
    driver = PausedDriver(files)
    driver.sleep(2, tags=["kv_cache"])
    assert driver.settle().pause == PauseState(mode="keep", sleeping=True, level=0, released=["kv_cache"])
    driver.sleep(2, tags=["weights"])
    assert driver.settle().pause.released == ["kv_cache", "weights"]
    driver.sleep(1)
    assert driver.settle().pause.level == 2
    driver.resume()
    assert not driver.settle().ok
    driver.wake_up(["weights"])
    assert driver.settle().pause == PauseState(mode="keep", sleeping=True, level=2, released=["kv_cache"])
    driver.wake_up(["weights"])
    assert driver.settle().pause.sleeping
    driver.wake_up(["kv_cache"])
    assert driver.settle().pause == PauseState()
    driver.wake_up()
    assert driver.settle().ok
    assert driver.complete(PROMPTS[1], "b", max_new_tokens=2, ignore_eos=True).tokens


def test_a_pause_before_the_sleep_outlasts_it(files: Path) -> None:
    driver = PausedDriver(files)
    driver.pause("keep")
    driver.sleep(mode=None)
    driver.settle()
    driver.wake_up()
    assert driver.settle().pause == PauseState(mode="keep")


@pytest.mark.parametrize("level", [1, 2])
def test_weights_in_an_order_of_their_own_sleep_too(files: Path, level: int) -> None:
    """bf16 on a CPU: see `layers/weights/onednn.py`."""
    driver = PausedDriver(files, dtype="bfloat16")
    before = driver.complete(PROMPTS[4], "a", max_new_tokens=5, ignore_eos=True)
    held = [m for m in driver.engine.runner._model.modules() if isinstance(m, OneDnnWeight)]
    assert all(m._packed is not None for m in held)
    driver.sleep(level)
    driver.settle()
    assert all((m._packed is None) == (level == 2) and nbytes(m.data) == 0 for m in held)
    driver.wake_up()
    driver.settle()
    after = driver.complete(PROMPTS[4], "a", max_new_tokens=5, ignore_eos=True)
    assert after.tokens == before.tokens
    driver.close()


def test_level_0_frees_nothing_and_lets_requests_wait(files: Path) -> None:
    driver = PausedDriver(files)
    driver.sleep(0)
    assert driver.settle().pause == PauseState(mode="keep", sleeping=True)
    driver.submit(PROMPTS[1], "a", rid="r", max_new_tokens=2, ignore_eos=True)
    driver.step(2)
    assert "r" not in driver.answers or not driver.answers["r"].tokens
    driver.wake_up([])
    driver.run()
    assert len(driver.answers["r"].tokens) == 2


def test_adapters_load_and_leave_while_asleep_and_pins_come_back(files: Path) -> None:
    driver = PausedDriver(files, "")
    driver.load("a", files / "a", pinned=True)
    driver.run()
    assert driver.stats.adapter_pages
    driver.sleep(2)
    driver.settle()
    driver.load("b", files / "b", pinned=True)
    driver.unload("a")
    driver.load("a", files / "a", pinned=True)
    driver.step(3)
    assert driver.stats.adapter_pages == 0
    driver.wake_up()
    driver.settle()
    driver.step(3)
    assert {adapter.level for adapter in driver.stats.adapters} == {"device"}


def test_dora_waits_for_the_base_weights(files: Path) -> None:
    plain = PausedDriver(files, "c").complete(PROMPTS[2], "c", max_new_tokens=4, ignore_eos=True)
    driver = PausedDriver(files, "")
    driver.sleep(2)
    driver.settle()
    driver.said.clear()
    driver.engine.handle(LoadAdapter(call=1, version=1, path=str(files / "c")))
    driver.step(5)
    assert not driver.said and not driver.engine.running
    driver.wake_up()
    while not (loaded := [reply.info for reply in driver.said if reply.info is not None]):
        driver.step()
    driver.infos["c"] = loaded[0]
    assert driver.complete(PROMPTS[2], "c", max_new_tokens=4, ignore_eos=True).tokens == plain.tokens


def test_discarded_weights_are_read_from_their_path(files: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    driver = PausedDriver(tmp_path, "", enable_lora=False)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    driver.sleep(2)
    driver.settle()
    path.rename(tmp_path / "away")
    driver.wake_up()
    refused = driver.settle()
    assert (refused.ok, refused.kind) == (False, "ConfigError")
    assert refused.pause is not None and refused.pause.sleeping
    save_file({name: tensor * 2 for name, tensor in weights.items()}, path, {"format": "pt"})
    driver.wake_up()
    assert driver.settle().ok
    assert driver.complete(PROMPTS[1], max_new_tokens=1).finished is not None
    assert torch.equal(weight_of(driver), 2 * weights["model.embed_tokens.weight"])
