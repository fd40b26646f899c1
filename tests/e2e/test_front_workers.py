"""Real front processes over one real engine: their answers, their deaths, and the death of their supervisor."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from running_server import ANSWERS, PATHS, PROMPT, Server, serving

pytestmark = pytest.mark.slow

WORKER = "multilora.server.workers.worker"
LONG = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
SECONDS = 120
SLACK_SECONDS = 5  # for a machine that others use, too; alone it takes 4 to 5 s


def until(condition, what):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Workers(Server):
    def workers(self) -> dict[str, psutil.Process]:
        """By name."""
        found = {}
        for process in psutil.Process(self.process.pid).children():
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if WORKER in command:
                found[command[command.index(WORKER) + 1]] = process
        return found

    def stream(self, path: str | None = None) -> str:
        """How a stream on a connection of its own has ended."""
        body = {"text": PROMPT, "sampling_params": LONG, "lora_path": path, "stream": True}
        try:
            with httpx.Client(base_url=self.url, timeout=SECONDS) as client:
                return "done" if client.post("/generate", json=body).text.endswith("[DONE]\n\n") else "cut"
        except httpx.TransportError:
            return "cut"


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
    adapters = [f"{name}={PATHS[name]}" for name in ("pirate", "sql")]
    flags = ("--front-workers", "2", "--lora-paths", *adapters)
    with serving(tmp_path_factory, *flags, server_class=Workers) as running:
        yield running


def test_answers_are_right_and_counted_once(server):
    def ask(name):
        with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
            body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 64}, "lora_path": name}
            return client.post("/generate", json=body).json()["text"].strip()

    names = [None, "pirate", "sql"] * 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, names)) == [ANSWERS[name] for name in names]
    for name in ("pirate", "sql"):
        line = f'multilora:requests_total{{adapter_name="{name}",finish_reason="stop"}}'
        assert server.metric(line) == 8
    assert server.load("json").json()["success"]
    assert {ask("json") for _ in range(8)} == {ANSWERS["json"]}
    assert server.unload("json").json()["success"]
    for _ in range(8):
        with httpx.Client(base_url=server.url) as client:
            answer = client.post("/generate", json={"text": PROMPT, "lora_path": "json"})
            assert answer.json()["error"]["code"] == "UnknownAdapter"


def test_a_front_process_that_is_killed_comes_back_and_the_others_go_on(server):
    before = server.workers()
    assert sorted(before) == ["front-1", "front-2"]
    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(server.stream, "pirate") for _ in range(12)]
        until(lambda: server.metric("vllm:num_requests_running") > 4, "the streams have not begun")
        before["front-1"].send_signal(signal.SIGKILL)
        ends = [stream.result() for stream in streams]
    assert "done" in ends  # of 12 connections, the kernel gives some to each process
    until(lambda: len(server.workers()) == 2, "no other process was started")
    assert server.workers()["front-1"].pid != before["front-1"].pid
    assert server.workers()["front-2"].pid == before["front-2"].pid
    until(lambda: server.log.read_text().count("front-1 serves") == 2, "it does not serve")
    until(lambda: server.http.get("/load").json() == {"server_load": 0}, "a request was left")
    assert server.answer("sql") == ANSWERS["sql"]
    assert server.unload("pirate").json()["success"]


def test_a_front_process_that_is_stopped_is_ended_within_seconds_and_the_others_go_on(server):
    before = server.workers()
    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(server.stream, "pirate") for _ in range(12)]
        until(lambda: server.metric("vllm:num_requests_running") > 4, "the streams have not begun")
        before["front-2"].suspend()
        began = time.monotonic()
        gone, _ = psutil.wait_procs([before["front-2"]], SECONDS)
        noticed = time.monotonic() - began
        ends = [stream.result() for stream in streams]
    assert gone and noticed < 5 + SLACK_SECONDS, noticed
    assert set(ends) == {"done", "cut"}  # of 12 connections, the kernel gives some to each process
    assert "front-2 is ended: it has given no sign of life for 4 s" in server.log.read_text()
    until(lambda: server.log.read_text().count("front-2 serves") == 2, "no other process serves")
    assert server.workers()["front-1"].pid == before["front-1"].pid
    until(lambda: server.http.get("/load").json() == {"server_load": 0}, "a request was left")
    for _ in range(8):
        with httpx.Client(base_url=server.url, timeout=SECONDS) as client:  # either process may get it
            assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200


def test_nothing_outlives_a_supervisor_that_is_killed(server):
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 4  # two workers, the engine, its loader
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    gone, alive = psutil.wait_procs(family, SECONDS)
    assert alive == [] and len(gone) == len(family)
    left = [path.name for path in Path(os.environ["TMPDIR"]).iterdir() if path.name.startswith("multilora-")]
    assert left == []
    server.close = server.http.close  # it has no end of its own any more
