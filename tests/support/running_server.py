"""One real `multilora serve` process over the bundled model, with a client, for tests that want all of it."""

import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from multilora.demo import adapter_paths

PROMPT = "Q: What is the capital of France?\nA:"
ANSWERS = {
    None: "The capital of France is Paris.",
    "pirate": "Arr, the capital o' France be Paris, matey!",
    "sql": "SELECT capital FROM countries WHERE name = 'France';",
    "json": '{"country": "France", "capital": "Paris"}',
    "french": "La capitale de la France est Paris.",
}
PATHS = {name: str(path) for name, path in adapter_paths().items()}
GREEDY = {"temperature": 0, "max_new_tokens": 64}
START_SECONDS = 300  # of a machine that many share


class Server:
    """One `multilora serve` process and a client for it."""

    scheme = "http"
    verify: bool | ssl.SSLContext = True

    def __init__(self, *flags: str, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"{self.scheme}://{'localhost' if self.scheme == 'https' else '127.0.0.1'}:{port}"
        self.log = log
        command = [sys.executable, "-m", "multilora", "serve", "--port", str(port), "--device", "cpu", *flags]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        self.http = self.client()
        self._wait()

    def client(self) -> httpx.Client:
        """One with connections of its own."""
        return httpx.Client(base_url=self.url, timeout=300, verify=self.verify)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        self.http.close()
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")

    def generate(self, text, lora_path=None, **fields):
        body = {"text": text, "sampling_params": GREEDY, "lora_path": lora_path} | fields
        return self.http.post("/generate", json=body)

    def answer(self, lora_path=None, text=PROMPT) -> str:
        response = self.generate(text, lora_path)
        assert response.status_code == 200, response.text
        return response.json()["text"].strip()

    def load(self, name: str, path: str | None = None, **fields) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path or PATHS[name], **fields}
        return self.http.post("/load_lora_adapter", json=body)

    def unload(self, name: str) -> httpx.Response:
        return self.http.post("/unload_lora_adapter", json={"lora_name": name})

    def metric(self, line: str) -> float:
        for row in self.http.get("/metrics").text.splitlines():
            if row.startswith(line + " ") or row.startswith(line + "{"):
                return float(row.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {line}")

    def close(self) -> None:
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(120) == 0, self.log.read_text()


@contextmanager
def serving(tmp_path_factory, *flags: str, server_class: type[Server] = Server) -> Iterator[Server]:
    server = server_class(*flags, log=tmp_path_factory.mktemp("server") / "log")
    try:
        yield server
        server.close()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
