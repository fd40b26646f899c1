"""Pausing and sleeping through every door; what only doors with an event loop can do, and HTTP's own words.

Covers `pause_manager.py` too.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doors import DOORS, AsyncDoor, Door, HttpDoor, LlmDoor

from multilora.errors import BadRequest, EngineAsleep, EnginePaused, MultiloraError

GREEDY = {"temperature": 0.0, "max_new_tokens": 6}
TEXT = "the cat and the dog, then the end."
LONG = {"temperature": 0.0, "max_new_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module", params=DOORS)
def own(request: pytest.FixtureRequest, door_files: Path) -> Iterator[Door]:
    """A door of this module's own, as a failure may leave it paused."""
    paths = {name: str(door_files / name) for name in "ab"}
    door = DOORS[request.param](door_files / "model", lora_paths=paths, device="cpu", max_total_tokens=4096)
    yield door
    door.close()


def change(door: Door, name: str, **options: Any) -> Any:
    """Call `pause`, `resume`, `sleep` or `wake_up` as the door has it."""
    if isinstance(door, LlmDoor):
        options.pop("mode", None)
        return getattr(door.llm, name)(**options)
    if isinstance(door, AsyncDoor):
        return door.run(getattr(door.llm, name)(**options))
    assert isinstance(door, HttpDoor)
    query = "&".join(f"{key}={item}" for key, value in options.items() for item in listed(value))
    return door.post(f"/{name}?{query}", {}).json()


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def states(door: Door) -> tuple[bool, bool]:
    """(paused, asleep), as the door says."""
    if isinstance(door, LlmDoor):
        return door.llm.is_paused(), door.llm.is_sleeping()
    if isinstance(door, AsyncDoor):
        return door.run(door.llm.is_paused()), door.run(door.llm.is_sleeping())
    assert isinstance(door, HttpDoor)
    return door.server.get("/is_paused").json()["is_paused"], door.server.get("/is_sleeping").json()["is_sleeping"]


def tokens(door: Door, lora_path: Any = None) -> list[int]:
    return door.generate(TEXT, GREEDY, lora_path)[0].token_ids


def test_pause_and_resume(own: Door, door_files: Path) -> None:
    before = [tokens(own, name) for name in (None, "a")]
    for _ in range(2):
        change(own, "pause", mode="wait")
        assert states(own) == (True, False)
    with pytest.raises(EnginePaused, match="paused"):
        own.generate(TEXT, GREEDY)
    own.load("c", door_files / "b")
    own.load("c", door_files / "a", replace=True)
    own.unload("c")
    for _ in range(2):
        change(own, "resume")
        assert states(own) == (False, False)
    assert [tokens(own, name) for name in (None, "a")] == before


QUICK = {("LLM", 1), ("AsyncLLM", 2), ("HTTP", 1)}
"""Beside level 0: both levels, and every door."""


@pytest.mark.parametrize(
    ("own", "level"),
    [
        pytest.param(door, level, marks=() if level == 0 or (door, level) in QUICK else pytest.mark.slow)
        for door in DOORS
        for level in (0, 1, 2)
    ],
    indirect=["own"],
    scope="module",
)
def test_sleep_and_wake_up(own: Door, level: int) -> None:
    before = [tokens(own, name) for name in (None, "a", "b")]
    for _ in range(2):
        change(own, "sleep", level=level, mode="wait")
        assert states(own) == (True, True)
    if level:
        with pytest.raises(EngineAsleep, match="asleep"):
            own.generate(TEXT, GREEDY)
    with pytest.raises(BadRequest, match="asleep"):
        change(own, "resume")
    change(own, "wake_up", tags=["weights"])
    assert states(own)[1] is bool(level)
    change(own, "wake_up")
    assert states(own) == (False, False)
    assert [tokens(own, name) for name in (None, "a", "b")] == before


def test_what_is_refused(own: Door) -> None:
    for options in ({"level": 3}, {"tags": ["wieghts"]}):
        with pytest.raises(BadRequest):
            change(own, "sleep", **options)
    if not isinstance(own, LlmDoor):
        with pytest.raises(BadRequest, match="mode = 'kep'"):
            change(own, "pause", mode="kep")
    assert states(own) == (False, False)


# ---------------------------------------------------------------------- requests that run, through AsyncLLM


@pytest.fixture
def online(door_files: Path) -> Iterator[AsyncDoor]:
    door = AsyncDoor(door_files / "model", device="cpu", max_total_tokens=4096)
    yield door
    door.close()


async def begin(door: AsyncDoor, **options: Any) -> "tuple[asyncio.Task[list[int]], list[int]]":
    """A request under way: the task of its end, and its tokens so far."""
    so_far: list[int] = []

    async def all_tokens() -> list[int]:
        async for answer in door.llm.generate(TEXT, LONG, **options):
            so_far[:] = answer.token_ids
        assert answer.finish_reason is not None
        return [*answer.token_ids, *([-1] if answer.finish_reason.type == "abort" else [])]

    task = asyncio.ensure_future(all_tokens())
    while len(so_far) < 3:
        await asyncio.sleep(0)
    return task, so_far


@pytest.mark.parametrize("sleeps", [False, True])
def test_requests_freeze_and_go_on(online: AsyncDoor, sleeps: bool) -> None:
    expected = online.generate(TEXT, LONG)[0].token_ids

    async def scene() -> None:
        llm = online.llm
        running, so_far = await begin(online)
        await (llm.sleep(2, "keep") if sleeps else llm.pause("keep"))
        frozen = list(so_far)
        late = None if sleeps else asyncio.ensure_future(anext(llm.generate(TEXT, LONG)))
        for _ in range(50):
            await asyncio.sleep(0)
        assert so_far == frozen and len(frozen) < len(expected)
        await (llm.wake_up() if sleeps else llm.resume())
        assert await running == expected
        if late is not None:
            await late

    online.run(scene())


def test_abort_and_wait(online: AsyncDoor) -> None:
    async def scene() -> None:
        llm = online.llm
        running, _ = await begin(online)
        await llm.pause("abort")
        assert (await running)[-1] == -1
        await llm.resume()
        running, _ = await begin(online)
        waiting = asyncio.ensure_future(llm.pause("wait"))
        while online.engine.engine.scheduler.pause.mode is None:
            await asyncio.sleep(0)
        with pytest.raises(EnginePaused):
            await anext(llm.generate(TEXT, LONG))
        assert len(await running) == 60
        await waiting
        await llm.resume()

    online.run(scene())


def test_closing_a_frozen_request_ends_it(online: AsyncDoor) -> None:
    async def scene() -> None:
        running, _ = await begin(online)
        await online.llm.pause("keep")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.sleep(0.05)
        assert online.engine.stats.running == 0
        await online.llm.resume()

    online.run(scene())


def test_unload_waits_for_a_frozen_request(online: AsyncDoor, door_files: Path) -> None:
    async def scene() -> None:
        llm = online.llm
        await llm.load_lora_adapter("x", str(door_files / "a"))
        running, _ = await begin(online, lora_path="x")
        await llm.pause("keep")
        unloading = asyncio.ensure_future(llm.unload_lora_adapter("x"))
        await llm.load_lora_adapter("y", str(door_files / "b"))
        await asyncio.sleep(0.05)
        assert not unloading.done()
        await llm.resume()
        await running
        await unloading
        assert set(llm.loaded_adapters()) == {"y"}

    paths = {"enable_lora": True}
    with_lora = AsyncDoor(door_files / "model", device="cpu", max_total_tokens=4096, **paths)
    online.llm, held = with_lora.llm, online.llm
    try:
        with_lora.run(scene())
    finally:
        online.llm = held
        with_lora.close()


# ---------------------------------------------------------------------- HTTP


@pytest.fixture(scope="module")
def http(door_files: Path) -> Iterator[HttpDoor]:
    door = HttpDoor(
        door_files / "model", lora_paths={"a": str(door_files / "a")}, device="cpu", max_total_tokens=4096
    )
    yield door
    door.close()


def test_paused_is_503_with_retry_after_and_healthy(http: HttpDoor) -> None:
    server = http.server
    assert http.post("/pause", {}).json() == {"status": "paused"}
    refused = server.post("/generate", {"text": TEXT})
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "EnginePaused", "1")
    streamed = server.post("/v1/completions", {"prompt": TEXT, "stream": True})
    assert (streamed.status, streamed.error["code"]) == (503, "EnginePaused")
    assert [server.get(path).status for path in ("/health", "/ready", "/health_generate")] == [200] * 3
    info = server.get("/server_info").json()
    assert (info["paused"], info["sleeping"]) == (True, False)
    assert "multilora:paused 1.0" in server.get("/metrics").text
    assert http.post("/resume", {}).json() == {"status": "resumed"}
    assert "multilora:paused 0.0" in server.get("/metrics").text


def test_sglangs_words(http: HttpDoor) -> None:
    async def scene() -> None:
        server = http.server
        for mode in ("abort", "retract", "in_place"):
            paused = await server.send("POST", "/pause_generation", {"mode": mode})
            assert paused.json() == {"message": "Generation paused successfully.", "status": "ok"}
            waits = server.connect("POST", "/generate", {"text": TEXT, "sampling_params": GREEDY})
            await asyncio.sleep(0.05)
            assert not waits.task.done()
            again = await server.send("POST", "/continue_generation", {"torch_empty_cache": True})
            assert again.json()["status"] == "ok"
            assert (await waits.answer()).status == 200

    http.run(scene())
    assert http.server.post("/pause_generation", {"mode": "keep"}).status == 400
    assert http.server.post("/pause_generation").status == 200
    assert http.server.post("/release_memory_occupation", {"tags": ["kv_cache"]}).status == 200
    assert http.server.post("/release_memory_occupation").status == 200
    assert states(http) == (True, True)
    assert http.server.post("/resume_memory_occupation", {"tags": ["weights", "cuda_graph"]}).status == 200
    assert states(http) == (True, True)
    assert http.server.get("/resume_memory_occupation").status == 200
    assert states(http) == (True, False)
    assert http.server.post("/continue_generation", {}).status == 200
    assert states(http) == (False, False)


def test_vllms_release_of_the_kv_cache_alone(http: HttpDoor) -> None:
    """After a pause, which ends with it, or by itself: what runs then goes on after the wake-up."""

    async def scene(pauses: bool) -> None:
        server = http.server
        runs = server.connect("POST", "/generate", {"text": TEXT, "sampling_params": LONG})
        while not http.engine.engine.scheduler.running:
            await asyncio.sleep(0)
        if pauses:
            assert (await server.send("POST", "/sleep?level=0&mode=keep")).status == 200
        released = await server.send("POST", "/release_kv_cache_memory")
        assert released.json() == {"status": "kv_cache_released"}
        assert (await server.send("GET", "/is_sleeping")).json() == {"is_sleeping": True}
        assert http.engine.engine.pauses.state.released == ["kv_cache"]
        awake = await server.send("POST", "/wake_up?tags=kv_cache")
        assert awake.json()["status"] == "awake"
        assert (await runs.answer()).status == 200

    for pauses in (True, False):
        http.run(scene(pauses))
        assert states(http) == (False, False)


def test_abort_requests(http: HttpDoor) -> None:
    async def scene() -> None:
        server = http.server
        body = {"text": TEXT, "sampling_params": LONG | {"n": 2}}
        for path, wanted in (
            ("/abort_requests", {"request_ids": ["x", "nope"]}),
            ("/inference/v1/abort_requests", {}),
        ):
            await server.send("POST", "/pause?mode=keep", {})
            running = [server.connect("POST", "/generate", body | {"rid": rid}) for rid in "xy"]
            await asyncio.sleep(0.05)
            aborted = await server.send("POST", path, wanted)
            if wanted:
                assert aborted.json() == {"status": "aborted", "aborted": 1}
            else:
                assert (aborted.status, aborted.body) == (200, b"")
            first = (await running[0].answer()).json()
            assert {one["meta_info"]["finish_reason"]["type"] for one in first} == {"abort"}
            await server.send("POST", "/resume", {})
            rest = (await running[1].answer()).json()
            assert {one["meta_info"]["finish_reason"]["type"] for one in rest} == {"length" if wanted else "abort"}

    http.run(scene())


def test_reset_prefix_cache(http: HttpDoor) -> None:
    for path, body in (
        ("/reset_prefix_cache", None),
        ("/reset_prefix_cache?reset_running_requests=true", {}),
        ("/reset_prefix_cache", {"reset_running_requests": True}),
    ):
        http.generate(2 * TEXT, GREEDY)
        assert http.generate(2 * TEXT, GREEDY)[0].cached_tokens
        assert http.server.post(path, body).json() == {"success": True}
        assert http.generate(2 * TEXT, GREEDY)[0].cached_tokens == 0


def test_facts_that_trainers_read(http: HttpDoor) -> None:
    server = http.server
    assert server.get("/get_world_size?include_dp=false").json() == {"world_size": 1}
    assert server.get("/weight_info").json() == {"weight_version": "default"}
    config = server.get("/server_info?config_format=json").json()["vllm_config"]
    assert config["lora_config"]["max_lora_rank"] >= 512
    assert config["lora_config"]["max_loras"] >= 1 << 20
    assert config["parallel_config"]["data_parallel_size"] == 1
    assert config["model_config"]["dtype"] == "torch.float32"


def test_the_calls_of_trl_in_its_order(http: HttpDoor, door_files: Path) -> None:
    server = http.server
    for version in range(3):
        name, path = f"trl-policy-v{version}", str(door_files / "ab"[version % 2])
        assert server.post("/pause?mode=keep").status == 200
        load = {"lora_name": name, "lora_path": path, "load_inplace": False}
        assert server.post("/v1/load_lora_adapter", load).status == 200
        assert server.post("/resume").status == 200
        if version:
            assert server.post("/v1/unload_lora_adapter", {"lora_name": f"trl-policy-v{version - 1}"}).status == 200
        assert server.post("/v1/completions", {"model": name, "prompt": [5, 6], "logprobs": 0}).status == 200
    http.unload("trl-policy-v2")


def test_errors_are_typed() -> None:
    assert issubclass(EngineAsleep, EnginePaused) and issubclass(EnginePaused, MultiloraError)
    assert EngineAsleep.status == 503
