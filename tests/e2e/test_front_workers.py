"""Real front processes over one real engine: their answers, their deaths, and the death of their supervisor."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from running_server import ANSWERS, PATHS, PROMPT, Server, serving

pytestmark = pytest.mark.slow

WORKER = "multilora.server.workers.worker"
LONG = {"temperature": 0, "max_new_tokens": 1900, "ignore_eos": True}
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

    def stream(self, path: str | None = None) -> tuple[int, str]:
        """The client's port of a stream on a connection of its own, and what became of it: "goes on" after the end of
        another process, "cut", or what came last."""
        body = {"text": PROMPT, "sampling_params": LONG, "lora_path": path, "stream": True}
        port, text, further = 0, "", 0
        try:
            with self.client() as client, client.stream("POST", "/generate", json=body) as response:
                port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
                self.begun[port] = True
                for text in response.iter_lines():
                    further += bool(text) and self.over.is_set()
                    if further > 20:
                        return port, "goes on"
        except httpx.TransportError:
            return port, "cut"
        return port, f"{response.status_code} {text}"

    def streams(self, pool: ThreadPoolExecutor) -> list[Future]:
        """Streams that run, some on each worker."""
        self.begun, self.over = {}, threading.Event()
        futures, deadline = [], time.monotonic() + SECONDS
        while len(self.begun) < len(futures) or len(set(self.owners().values())) < 2:
            assert time.monotonic() < deadline, f"all connections go to one process, or are not taken: {self.begun}"
            if len(self.begun) == len(futures):
                futures += [pool.submit(self.stream, "pirate") for _ in range(6)]
            time.sleep(0.02)
        return futures

    def owners(self) -> dict[int, str]:
        """The names of the workers that have the other ends of the streams' connections, by the clients' ports."""
        found = {}
        for name, process in self.workers().items():
            found |= {one.raddr.port: name for one in process.net_connections("tcp") if one.raddr}
        return {port: found[port] for port in list(self.begun)}

    def end(self, victim: str, how: Callable[[psutil.Process], None]) -> None:
        """Have one worker's process end beside running streams: those on it are cut, the others are not."""
        with ThreadPoolExecutor(60) as pool:
            streams = self.streams(pool)
            owners = self.owners()
            how(self.workers()[victim])
            self.over.set()
            ends = dict(stream.result() for stream in streams)
        expected = {port: "cut" if owner == victim else "goes on" for port, owner in owners.items()}
        assert ends == expected, self.log.read_text()


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
    adapters = [f"{name}={PATHS[name]}" for name in ("pirate", "sql")]
    flags = ("--front-workers", "2", "--lora-paths", *adapters)
    with serving(tmp_path_factory, *flags, server_class=Workers) as running:
        for place in (1, 2):  # one answers before the other takes connections
            until(lambda told=f"front-{place} serves": told in running.log.read_text(), "it does not serve")
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
    server.end("front-1", lambda process: process.send_signal(signal.SIGKILL))
    until(lambda: len(server.workers()) == 2, "no other process was started")
    assert server.workers()["front-1"].pid != before["front-1"].pid
    assert server.workers()["front-2"].pid == before["front-2"].pid
    until(lambda: server.log.read_text().count("front-1 serves") == 2, "it does not serve")
    until(lambda: server.http.get("/load").json() == {"server_load": 0}, "a request was left")
    assert server.answer("sql") == ANSWERS["sql"]
    assert server.unload("pirate").json()["success"]


def test_a_front_process_that_is_stopped_is_ended_within_seconds_and_the_others_go_on(server):
    before = server.workers()
    took = []

    def stop(process):
        process.suspend()
        began = time.monotonic()
        assert psutil.wait_procs([process], SECONDS)[0]
        took.append(time.monotonic() - began)

    server.end("front-2", stop)
    assert took[0] < 5 + SLACK_SECONDS
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
