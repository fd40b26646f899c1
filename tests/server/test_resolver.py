"""Adapters that are loaded because a request names them: flights, misses, failures, quotas, deadlines, metrics.

Covers `resolving.py` too.
"""

import asyncio
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import Answer, LocalServer, run

from multilora.adapters.sources.download import Downloads, Stop
from multilora.adapters.sources.inside import copy_adapter
from multilora.errors import AdapterInvalid, AdapterUnavailable
from multilora.front import resolver
from multilora.front.adapter_manager import AdapterManager
from multilora.front.effects import Flight, Steps, WaitUntilDone
from multilora.front.fetcher import Fetcher, Found

IDS = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b", "c", "org/d"):
        add(tmp_path / "root", name)
    return tmp_path / "root"


def add(root: Path, name: str, nbytes: int = 100) -> None:
    """Write an adapter elsewhere and rename it, as trainers do."""
    made = root.parent / "incoming"
    made.mkdir(parents=True)
    (made / "adapter_config.json").write_text("{}")
    (made / "adapter_model.safetensors").write_bytes(bytes(nbytes))
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    made.rename(root / name)


def server(root: Path, **config: Any) -> LocalServer:
    return LocalServer(FakeEngineClient(), None, lora_resolver_dir=str(root), **config)


def ask(name: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", "/generate", IDS | {"lora_path": name}


def events(s: LocalServer) -> dict[str, int]:
    found = re.findall(r'multilora:resolver_events_total\{event="(\w+)"\} (\d+)', s.get("/metrics").text)
    return {event: int(count) for event, count in found if int(count)}


def spooled(s: LocalServer) -> int:
    return len(list(s.spool.root.iterdir()))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator["Gate"]:
    gate = Gate()
    monkeypatch.setattr("multilora.front.fetcher.copy_adapter", gate.copy)
    yield gate
    gate.open.set()


class Gate:
    """Holds up every copy from a resolver's directory until `open`; `names`: those that were asked for."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.names: list[str] = []

    def copy(self, root: str, name: str, target: Path, **options: Any) -> bool:
        self.names.append(name)
        self.open.wait(20)
        return copy_adapter(root, name, target, **options)

    async def reached(self, count: int) -> None:
        while len(self.names) < count:
            await asyncio.sleep(0.005)


# ---------------------------------------------------------------------- every way to name one


BODIES = {
    "native": ("/generate", IDS | {"lora_path": "a"}),
    "native, a list": ("/generate", {"input_ids": [[5], [6]], "lora_path": ["a", None]}),
    "native, a composition": ("/generate", IDS | {"lora_path": [{"name": "a", "weight": 0.5}, {"name": "b"}]}),
    "native, model": ("/generate", IDS | {"model": "base:a"}),
    "model": ("/v1/completions", {"model": "a", "prompt": [5, 6]}),
    "base:adapter": ("/v1/completions", {"model": "base:a", "prompt": [5, 6]}),
    "lora_path": ("/v1/completions", {"model": "base", "prompt": [5, 6], "lora_path": "a"}),
    "below a directory": ("/v1/completions", {"model": "org/d", "prompt": [5, 6]}),
    "stream": ("/v1/completions", {"model": "a", "prompt": [5, 6], "stream": True}),
}


@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES)
def test_every_way_to_name_an_adapter(root: Path, path: str, body: dict[str, Any]) -> None:
    s = server(root)
    answer = s.post(path, body)
    assert answer.status == 200, answer.text
    name = "org/d" if "org/d" in str(body) else "a"
    assert s.registry.loaded()[name] == str(root / name)
    assert s.client.submitted[0].adapters[0][0] in s.client.loaded
    assert all(ref.num_requests == 0 for ref in s.registry.refs())
    assert {"base", name} <= {m["id"] for m in s.get("/v1/models").json()["data"]}


def test_it_is_loaded_once_and_counted(root: Path) -> None:
    s = server(root)
    assert [s.post("/generate", IDS | {"lora_path": "a"}).status for _ in range(3)] == [200] * 3
    assert list(s.client.loaded) == [1]
    assert events(s) == {"hit": 1}
    assert s.client.loaded[1] == str(s.spool.root / "1")  # the copy, which nobody can swap


def test_without_a_resolver_nothing_is_looked_for(root: Path) -> None:
    s = LocalServer(FakeEngineClient(), None)
    assert s.post("/generate", IDS | {"lora_path": "a"}).status == 400
    assert events(s) == {}


# ---------------------------------------------------------------------- misses and failures


def test_a_miss_says_what_it_always_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    s, plain = server(root), LocalServer(FakeEngineClient(), None)
    for path, body in [
        ("/generate", IDS | {"lora_path": "nope"}),
        ("/v1/completions", {"model": "nope", "prompt": [5]}),
        ("/v1/completions", {"model": "base:nope", "prompt": [5]}),
        ("/v1/completions", {"model": "../a", "prompt": [5]}),
        ("/v1/completions", {"model": "base:", "prompt": [5], "lora_path": "x" * 300}),
        ("/generate", IDS | {"lora_path": [[[["a"]]]]}),
    ]:
        found, expected = s.post(path, body), plain.post(path, body)
        assert (found.status, found.json()) == (expected.status, expected.json())
        assert found.status in (400, 404)
    assert "in no place of --lora-resolver" in caplog.text
    assert spooled(s) == 0
    assert s.client.loaded == {}


def test_what_is_not_there_is_not_looked_for_again_for_a_while(
    root: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.open.set()
    s = server(root)
    assert [s.post("/generate", IDS | {"lora_path": "new"}).status for _ in range(3)] == [400] * 3
    assert gate.names == ["new"]
    add(root, "new")
    assert s.post("/generate", IDS | {"lora_path": "new"}).status == 400
    monkeypatch.setattr(resolver.time, "monotonic", lambda: 1e9)
    assert s.post("/generate", IDS | {"lora_path": "new"}).status == 200
    assert events(s) == {"miss": 1, "hit": 1}


def test_the_memory_of_misses_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "MAX_ABSENT", 3)
    s = server(root)
    for i in range(5):
        s.post("/generate", IDS | {"lora_path": f"n{i}"})
    assert list(s.driver.front.resolver._absent) == ["n2", "n3", "n4"]


def test_a_failure_names_the_adapter_and_no_path(root: Path) -> None:
    s = server(root)
    kept = str(s.spool.root / "1")
    s.client.load_errors[kept] = AdapterInvalid(f"{kept}: broken")
    for _ in range(2):
        answer = s.post("/generate", IDS | {"lora_path": "a"})
        assert (answer.status, answer.error["message"]) == (400, "a: broken")
    assert events(s) == {"failure": 1}
    assert s.registry.loaded() == {}
    assert spooled(s) == 0


def test_after_an_unload_a_request_brings_it_back(root: Path) -> None:
    s = server(root)
    s.post("/generate", IDS | {"lora_path": "a"})
    assert s.post("/unload_lora_adapter", {"lora_name": "a"}).status == 200
    assert (spooled(s), s.client.loaded) == (0, {})
    assert s.post("/generate", IDS | {"lora_path": "a"}).status == 200
    assert list(s.client.loaded) == [2]


def test_what_a_client_has_loaded_is_left_alone(root: Path) -> None:
    s = server(root, max_resolved_loras=1)
    s.load("a")
    for name in ("a", "b", "c"):
        assert s.post("/generate", IDS | {"lora_path": name}).status == 200
    assert sorted(s.registry.loaded()) == ["a", "c"]
    assert s.client.loaded[1] == "/adapters/a"


# ---------------------------------------------------------------------- flights


def test_one_flight_however_many_wait(root: Path, gate: Gate) -> None:
    s = server(root)

    async def work() -> list[Answer]:
        asked = [s.connect(*ask("a")) for _ in range(20)]
        await gate.reached(1)
        await asyncio.sleep(0.05)
        gate.open.set()
        return [await one.answer() for one in asked]

    assert [answer.status for answer in run(work())] == [200] * 20
    assert gate.names == ["a"]
    assert list(s.client.loaded) == [1]


def test_a_client_that_hangs_up_does_not_end_the_flight_of_others(root: Path, gate: Gate) -> None:
    s = server(root)

    async def work() -> Answer:
        first = s.connect(*ask("a"))
        await gate.reached(1)
        second = s.connect(*ask("a"))
        await asyncio.sleep(0.02)
        first.hang_up()
        assert (await first.answer()).status == 499
        gate.open.set()
        return await second.answer()

    assert run(work()).status == 200
    assert gate.names == ["a"]


async def idle(s: LocalServer) -> None:
    """Until nothing is on its way any more."""
    while s.driver._changes or s.driver.front.resolver._flights:
        await asyncio.sleep(0.005)


def test_a_flight_that_nobody_waits_for_any_more_is_cancelled(root: Path, gate: Gate) -> None:
    s = server(root)

    async def work() -> Answer:
        asked = [s.connect(*ask("a")) for _ in range(3)]
        await gate.reached(1)
        while s.driver.front.resolver._flights["a"].waiting < 3:
            await asyncio.sleep(0.005)
        for one in asked:
            assert s.driver.front.resolver._flights, "somebody waits still"
            one.hang_up()
            await one.answer()
        await idle(s)
        again = s.connect(*ask("a"))
        await gate.reached(2)
        gate.open.set()
        answer = await again.answer()
        while spooled(s) > 1:  # the thread of the cancelled one deletes what it has copied
            await asyncio.sleep(0.005)
        return answer

    assert run(work()).status == 200
    assert gate.names == ["a", "a"]
    assert list(s.client.loaded) == [1]
    assert not s.driver.front.resolver._wanted


def test_a_download_that_nobody_waits_for_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, killed = threading.Event(), threading.Event()

    def fetch(self: object, path: str, target: Path, *, stop: Stop, **options: Any) -> Path:
        stop.attach(SimpleNamespace(kill=killed.set))
        begun.set()
        assert killed.wait(20)
        raise AdapterUnavailable("stopped")

    monkeypatch.setattr(Downloads, "fetch", fetch)
    s = LocalServer(FakeEngineClient(), None, lora_resolver_hub=("org/*",))

    async def work() -> None:
        asked = s.connect(*ask("org/a"))
        while not begun.is_set():
            await asyncio.sleep(0.005)
        asked.hang_up()
        await asked.answer()
        await idle(s)
        while spooled(s):  # the thread cleans up
            await asyncio.sleep(0.005)
        assert killed.is_set()

    run(work())


def test_a_flight_goes_on_for_those_who_were_told_to_come_back(root: Path, gate: Gate) -> None:
    s = server(root, lora_resolver_timeout=1)

    async def work() -> None:
        assert (await s.send(*ask("a"))).status == 503
        second = s.connect(*ask("a"))
        while s.driver.front.resolver._num_waiting < 1:
            await asyncio.sleep(0.005)
        second.hang_up()
        await second.answer()
        gate.open.set()
        while "a" not in s.registry.loaded():
            await asyncio.sleep(0.005)

    run(work())
    assert gate.names == ["a"]


def test_the_wait_of_a_request_is_bounded(root: Path, gate: Gate) -> None:
    s = server(root, lora_resolver_timeout=1)

    async def work() -> tuple[Answer, Answer, Answer]:
        late = await s.send(*ask("a"))
        other = await s.send("POST", "/generate", IDS)
        gate.open.set()
        return late, other, await s.send(*ask("a"))

    late, other, again = run(work())
    assert (late.status, other.status, again.status) == (503, 200, 200)
    assert "still being fetched" in late.error["message"]
    assert "retry-after" in late.headers


def test_flights_and_waiting_requests_are_bounded(root: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "MAX_FLIGHTS", 2)
    s = server(root, max_queued_requests=3)

    async def work() -> list[Answer]:
        flying = [s.connect(*ask(name)) for name in "ab"]
        await gate.reached(2)
        third = await s.send(*ask("c"))
        flying.append(s.connect(*ask("a")))
        await asyncio.sleep(0.02)
        full = await s.send(*ask("a"))
        gate.open.set()
        return [third, full, *[await one.answer() for one in flying]]

    found = run(work())
    assert [answer.status for answer in found] == [503, 503, 200, 200, 200]
    assert "are being fetched already" in found[0].error["message"]
    assert "requests wait for adapters" in found[1].error["message"]


def test_a_load_by_a_client_meanwhile_wins(root: Path, gate: Gate) -> None:
    s = server(root)

    async def work() -> Answer:
        asked = s.connect(*ask("a"))
        await gate.reached(1)
        await s.load_from("a", "/adapters/a")
        gate.open.set()
        return await asked.answer()

    assert run(work()).status == 200
    assert s.registry.loaded() == {"a": "/adapters/a"}
    assert spooled(s) == 0


# ---------------------------------------------------------------------- quotas


def test_the_one_unused_longest_is_unloaded_for_the_next(root: Path) -> None:
    s = server(root, max_resolved_loras=2)
    for name in ("a", "b", "a", "c"):
        assert s.post("/generate", IDS | {"lora_path": name}).status == 200
    assert list(s.registry.loaded()) == ["a", "c"]
    assert s.post("/generate", IDS | {"lora_path": "b"}).status == 200
    assert list(s.registry.loaded()) == ["c", "b"]
    assert events(s) == {"hit": 4, "eviction": 2}
    assert spooled(s) == 2


def test_disk_space_is_bounded(root: Path) -> None:
    s = server(root, lora_resolver_bytes=250)  # an adapter of the fixture has 102
    for name in ("a", "b", "c"):
        assert s.post("/generate", IDS | {"lora_path": name}).status == 200
    assert list(s.registry.loaded()) == ["b", "c"]
    add(root, "large", 300)
    answer = s.post("/generate", IDS | {"lora_path": "large"})
    assert (answer.status, "over 250 bytes" in answer.error["message"]) == (400, True)
    assert list(s.registry.loaded()) == ["b", "c"]
    assert spooled(s) == 2


def test_what_is_in_use_is_not_unloaded(root: Path) -> None:
    s = server(root, max_resolved_loras=1)

    async def work() -> tuple[Answer, Answer, Answer]:
        s.client.gate.clear()
        running = s.connect(*ask("a"))
        while not s.client.submitted:
            await asyncio.sleep(0.005)
        refused = await s.send(*ask("b"))
        s.client.gate.set()
        return refused, await running.answer(), await s.send(*ask("b"))

    refused, running, later = run(work())
    assert (refused.status, running.status, later.status) == (503, 200, 200)
    assert list(s.registry.loaded()) == ["b"]


def test_parts_of_a_composition_are_not_unloaded(root: Path) -> None:
    s = server(root, max_resolved_loras=1)
    s.post("/generate", IDS | {"lora_path": "a"})
    s.post("/load_lora_adapter", {"lora_name": "mix", "lora_path": [{"name": "a", "weight": 0.5}]})
    assert s.post("/generate", IDS | {"lora_path": "b"}).status == 503
    assert s.post("/generate", IDS | {"lora_path": "mix"}).status == 200


def test_what_is_being_unloaded_for_one_is_not_unloaded_for_another(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = server(root, max_resolved_loras=1)
    assert s.post("/generate", IDS | {"lora_path": "a"}).status == 200
    unload, unloaded, find, found_both = AdapterManager.unload_resolved, [], Fetcher.find, Flight()
    waiting = {"b", "c"}

    def slowly(self: AdapterManager, name: str) -> Steps[None]:
        unloaded.append(name)
        yield from WaitUntilDone(Flight(), 0.2)
        yield from unload(self, name)

    def together(self: Fetcher, name: str) -> Steps[Found | None]:  # both look for room in one turn of the loop
        found = yield from find(self, name)
        waiting.discard(name)
        if not waiting:
            found_both.finish()
        yield from WaitUntilDone(found_both, 30)
        return found

    async def work() -> list[Answer]:
        return await asyncio.gather(*[s.send(*ask(name)) for name in ("b", "c")])

    monkeypatch.setattr(AdapterManager, "unload_resolved", slowly)
    monkeypatch.setattr(Fetcher, "find", together)
    answers = run(work())
    assert {answer.status for answer in answers} <= {200, 503} and any(answer.status == 200 for answer in answers)
    assert unloaded.count("a") == 1


def test_a_request_for_what_is_just_being_unloaded_waits_and_gets_it(root: Path) -> None:
    s = server(root, max_resolved_loras=1)
    names = ["a", "b", "c"] * 10

    async def work() -> list[Answer]:
        return await asyncio.gather(*[s.send(*ask(name)) for name in names])

    answers = run(work())
    assert {answer.status for answer in answers} <= {200, 503}
    assert sum(answer.status == 200 for answer in answers) >= 10
    assert len(s.registry.loaded()) == len(s.client.loaded) == spooled(s) == 1
    assert all(ref.num_requests == 0 for ref in s.registry.refs())


def test_one_request_may_name_many(root: Path) -> None:
    names = [f"x{i}" for i in range(20)]
    for name in names:
        add(root, name)
    s = server(root)
    answer = s.post(
        "/generate", {"input_ids": [[5]] * 20, "lora_path": names, "sampling_params": {"max_new_tokens": 1}}
    )
    assert answer.status == 200
    assert sorted(s.registry.loaded()) == sorted(names)


# ---------------------------------------------------------------------- URLs in a request's body


def test_a_body_makes_the_server_fetch_nothing_but_what_a_flag_allows() -> None:
    s = LocalServer(FakeEngineClient(), None, lora_resolver_url="http://127.0.0.1:1/adapters")
    for url in (
        "http://127.0.0.1:1/other/a",
        "http://169.254.169.254/x",
        "s3://bucket/a",
        "http://127.0.0.1:1/adapters/../a",
    ):
        answer = s.post("/load_lora_adapter", {"lora_name": "x", "lora_path": url})
        assert (answer.status, "below no --lora-resolver-url" in answer.json()["error_message"]) == (400, True)
    answer = s.post("/load_lora_adapter", {"lora_name": "x", "lora_path": "file:///etc"})
    assert "not an http(s)://, s3:// or gs:// URL" in answer.json()["error_message"]
    answer = s.post("/load_lora_adapter", {"lora_name": "x", "lora_path": "http://127.0.0.1:1/adapters/a"})
    assert "cannot be fetched" in answer.json()["error_message"]  # tried
    assert (s.registry.loaded(), spooled(s)) == ({}, 0)
