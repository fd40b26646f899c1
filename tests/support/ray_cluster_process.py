"""A cluster on Ray under load: replicas are killed, added and removed, adapters are swapped. A process of its own, as
Ray is loud and stays. Prints what has happened as one line of JSON.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter

import httpx
import psutil

from bench.cluster_client import ray_here
from multilora.cluster import running
from multilora.cluster.cluster_config import ClusterConfig
from multilora.demo import adapter_paths

PORT = 18_211
URL = f"http://127.0.0.1:{PORT}"
ADAPTERS = 60
PROMPT = "Q: What is the capital of France?\nA:"  # which every bundled adapter answers in a way of its own
RETRYABLE = {429, 503}


def config(state_dir, replicas):
    engine = {"device": "cpu", "max_running_requests": 8, "served_model_name": "base", "drain_seconds": 10}
    return ClusterConfig.make(
        {"state_dir": state_dir, "replicas": replicas, "cpus": 0.1, "port": PORT, "slack": 2.0, "serve": engine}
    )


class Load:
    """Clients that ask for adapters in turn, half of them as streams, until they are told to stop."""

    def __init__(self, clients=4):
        self.endings, self.wrong, self.hot = Counter(), [], []  # hot: (sent, text)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(i,), daemon=True) for i in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, number):
        with httpx.Client(base_url=URL, timeout=180) as client:
            turn = number
            while not self._stop.is_set():
                turn += 7
                name = "hot" if turn % 3 == 0 else f"a{turn % ADAPTERS}"
                ask = self._stream if turn % 2 else self._whole
                try:
                    self.endings[ask(client, name)] += 1
                except httpx.HTTPError as e:
                    self.wrong.append(f"no ending: {e!r}")

    def _body(self, name):
        return {"model": name, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}

    def _whole(self, client, name):
        sent = time.monotonic()
        answer = client.post("/v1/completions", json=self._body(name))
        if answer.status_code == 200:
            text = answer.json()["choices"][0]["text"]
            if name == "hot":
                self.hot.append((sent, text))
            return "whole"
        if answer.status_code not in RETRYABLE:
            self.wrong.append(f"{answer.status_code} {answer.text[:200]}")
        return f"refused {answer.status_code}"

    def _stream(self, client, name):
        sent, text, endings, error = time.monotonic(), "", 0, None
        with client.stream("POST", "/v1/completions", json=self._body(name) | {"stream": True}) as answer:
            if answer.status_code != 200:
                content = answer.read().decode()
                if answer.status_code not in RETRYABLE:
                    self.wrong.append(f"{answer.status_code} {content[:200]}")
                return f"refused {answer.status_code}"
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    endings += 1
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    error = event.get("error") or error
                    text += "".join(choice["text"] for choice in event.get("choices", ()))
        if endings != 1:
            self.wrong.append(f"{endings} endings of a stream")
        if error is not None:
            return f"stream error {error['code']}"
        if name == "hot":
            self.hot.append((sent, text))
        return "stream"


def replica_processes():
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if "ServeReplica:multilora:replica" in title or "multilora#replica#" in title:
                found.append(process)
        except psutil.Error:
            continue
    return found


def load(name, path, **fields):
    body = {"lora_name": name, "lora_path": str(path)} | fields
    answer = httpx.post(f"{URL}/v1/load_lora_adapter", json=body, timeout=180)
    assert answer.status_code == 200, answer.text


def wait_for_replicas(count, seconds=600):
    deadline, seen = time.monotonic() + seconds, set()
    while time.monotonic() < deadline:
        try:
            text = httpx.get(f"{URL}/metrics", timeout=60).text
        except httpx.TransportError:  # a machine that is busy may be late
            continue
        seen = {line.partition('replica="')[2].partition('"')[0] for line in text.splitlines() if 'replica="' in line}
        if len(seen) == count and len(replica_processes()) == count:
            return
        time.sleep(1)
    raise TimeoutError(f"not {count} replicas, but {seen}")


def main(state_dir):
    report = {}
    started = time.monotonic()
    running.start(config(state_dir, 3))
    report["start_s"] = round(time.monotonic() - started, 1)
    paths = list(adapter_paths().values())
    for i in range(ADAPTERS):
        load(f"a{i}", paths[i % len(paths)])
    load("hot", adapter_paths()["sql"])
    clients = Load()
    time.sleep(8)
    os.kill(replica_processes()[0].pid, signal.SIGKILL)
    wait_for_replicas(3)
    report["after_kill_s"] = round(time.monotonic() - started, 1)
    running.start(config(state_dir, 4))
    wait_for_replicas(4)
    asked = httpx.post(f"{URL}/v1/completions", json=clients._body("hot"), timeout=180)
    old = asked.json()["choices"][0]["text"]
    load("hot", adapter_paths()["pirate"], load_inplace=True)
    swapped = time.monotonic()
    time.sleep(10)
    running.start(config(state_dir, 2))
    wait_for_replicas(2)
    time.sleep(5)
    clients.stop()
    report |= {"endings": dict(clients.endings), "wrong": clients.wrong[:10], "old": old}
    report["after"] = sorted({text for sent, text in clients.hot if sent > swapped})
    report["before"] = sorted({text for sent, text in clients.hot if sent < swapped})
    report["adapters"] = len(httpx.get(f"{URL}/v1/models", timeout=60).json()["data"]) - 1
    report["seconds"] = round(time.monotonic() - started, 1)
    return report


if __name__ == "__main__":
    with ray_here():
        found = main(sys.argv[1])
    print("REPORT " + json.dumps(found), flush=True)
