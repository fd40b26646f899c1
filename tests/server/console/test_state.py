"""What the console is told, by whom it is asked. Covers `console/routes.py`."""

import logging

import msgspec
import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from keys import KeyedServer

from multilora import logs
from multilora.engine.messages import AdapterStats, PauseState
from multilora.server.console.routes import PAGE, PARTS, POLICY

FACTS = {
    "level": "device",
    "pinned": False,
    "rank": 8,
    "running": 0,
    "waiting": 0,
    "host_bytes": 10,
    "device_bytes": 20,
    "loads": 1,
    "evictions": 0,
    "fetches": 1,
    "hits": 5,
    "misses": 2,
    "load_seconds": 0.5,
}


def with_stats(server, **changes):
    """The engine says that every adapter is on the device."""
    versions = [ref.version for ref in server.driver.front.registry.refs()]
    stats = [AdapterStats(version=version, **FACTS) for version in versions]
    server.client.stats = msgspec.structs.replace(server.client.stats, adapters=stats, **changes)


@pytest.fixture
def server():
    return LocalServer(FakeEngineClient(), None)


@pytest.mark.parametrize("path", ["/console", *(f"/console/{part}" for part in PARTS)])
def test_the_page_and_its_parts(server, path):
    answer = server.get(path)
    assert answer.status == 200
    name = path.removeprefix("/console").removeprefix("/") or "index.html"
    assert answer.body == (PAGE / name).read_bytes()
    assert answer.headers["content-type"].startswith(PARTS.get(name, "text/html"))
    assert answer.headers["content-security-policy"] == POLICY


def test_the_page_asks_nobody_else_and_has_no_script_or_style_of_its_own():
    text = (PAGE / "index.html").read_text()
    assert "style=" not in text
    assert "onclick" not in text
    for part in PAGE.iterdir():
        addresses = part.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in [line.strip()[:2] for line in addresses.splitlines() if "http" in line]
        assert "http://" not in addresses.replace("'http://www.w3.org", "")
        assert "https://" not in addresses


def test_a_browser_gets_the_page_at_the_root_and_a_program_the_version(server):
    assert server.get("/").json()["name"] == "multilora"
    browser = server.get("/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert browser.headers["content-type"].startswith("text/html")
    assert "<title>multilora console</title>" in browser.text


def test_the_state_of_adapters_arena_and_counters(server):
    run(server.load_from("a", "/adapters/a", pinned=True))
    server.load("b")
    parts = [{"name": "a"}, {"name": "b", "weight": 0.5}]
    assert server.post("/load_lora_adapter", {"lora_name": "mix", "lora_path": parts}).status == 200
    with_stats(server, total_pages=9, free_pages=4, kv_pages=2, prefix_pages=1, adapter_pages=2)
    body = {"input_ids": [5], "lora_path": "a", "sampling_params": {"max_new_tokens": 2}}
    assert server.post("/generate", body).status == 200
    state = server.get("/console/state").json()
    assert state["engine"] == "running"
    assert state["caller"] == {"key_id": "", "tenant": "", "admin": True, "loads": True, "pins": True}
    arena = state["arena"]
    assert [arena[f"{name}_pages"] for name in ("total", "free", "kv", "prefix", "adapter")] == [9, 4, 2, 1, 2]
    assert state["counters"]["endings"]["length"] + state["counters"]["endings"]["stop"] == 1
    assert state["counters"]["first_token"][1] == 1
    assert state["queues"] == []
    a, b, mix = state["adapters"]
    assert (a["name"], a["pinned"], a["level"], a["device_bytes"], a["hits"]) == ("a", True, "device", 20, 5)
    assert (b["name"], b["pinned"], b["requests"]) == ("b", False, 0)
    assert (mix["level"], mix["path"]) == ("composition", "a + 0.5 * b")


def test_the_state_of_the_engine(server):
    assert server.get("/console/state").json()["engine"] == "running"
    pauses = server.driver.front.pauses
    pauses.state = PauseState(mode="keep")
    assert server.get("/console/state").json()["engine"] == "paused"
    pauses.state = PauseState(mode="abort", sleeping=True)
    assert server.get("/console/state").json()["engine"] == "sleeping"
    pauses.state = PauseState()
    server.client.restarting = True
    assert server.get("/console/state").json()["engine"] == "restarting"
    server.client.alive = False
    assert server.get("/console/state").json()["engine"] == "dead"


def test_a_tenant_sees_its_own(tmp_path):
    for tenant in ("acme", "zorg"):
        (tmp_path / tenant / "sql").mkdir(parents=True)
        (tmp_path / tenant / "sql" / "adapter_config.json").write_text("{}")
        (tmp_path / tenant / "sql" / "adapter_model.safetensors").write_bytes(b"")
    server = KeyedServer(tmp_path, lora_root=(str(tmp_path),))
    for key in ("acme", "zorg"):
        body = {"lora_name": "mine", "lora_path": "sql"}
        assert server.post("/load_lora_adapter", body, key=key).status == 200
    server.load("common")
    with_stats(server)
    assert server.get("/console/state").status == 401
    state = server.get("/console/state", key="acme").json()
    assert (state["arena"], state["counters"]) == (None, None)
    assert state["caller"] == {"key_id": "acme", "tenant": "acme", "admin": False, "loads": True, "pins": False}
    assert [(a["name"], a["own"], "hits" in a) for a in state["adapters"]] == [
        ("mine", True, True),
        ("common", False, False),
    ]
    assert "zorg" not in server.get("/console/state", key="acme").text
    every = server.get("/console/state", key="ops").json()["adapters"]
    assert [a["name"] for a in every] == ["acme:mine", "zorg:mine", "common"]


def test_the_log_is_the_admins(tmp_path):
    server = KeyedServer(tmp_path)
    assert server.get("/console/log", key="acme").status == 403
    assert "lines" in server.get("/console/log", key="ops").json()


def test_the_log_has_the_lines_after_a_number(server):
    logs.setup("info")
    logging.getLogger("multilora.x").info("first %d", 1)
    last = server.get("/console/log").json()["lines"][-1]
    assert (last["level"], last["message"]) == ("info", "first 1")
    logging.getLogger("multilora.x").warning("second")
    lines = server.get(f"/console/log?after={last['number']}").json()["lines"]
    assert [line["message"] for line in lines] == ["second"]
    assert server.get("/console/log?after=x").status == 400
