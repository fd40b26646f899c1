"""The blocks of README and docs/quickstart.md, run as they stand but for the port: the server, curl, Python."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import ANSWERS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
START_SECONDS = 300
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def here(text: str, port: int) -> str:
    """The block for this interpreter and this port."""
    text = re.sub(r"\bpython -c", f"{sys.executable} -c", text).replace("localhost:30000", f"127.0.0.1:{port}")
    return text.replace("multilora serve", f"exec {sys.executable} -m multilora serve --port {port} --device cpu")


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    """Of the server that the quickstart starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    script, *_ = blocks("docs/quickstart.md", "sh")
    assert "multilora serve --lora-paths" in script
    log = tmp_path_factory.mktemp("typed") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            ["bash", "-c", here(script, number)], cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + START_SECONDS
    try:
        while not healthy(number):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield number
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def output(command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shell(block: str, port: int) -> object:
    return json.loads(output(["bash", "-c", here(block, port)]))


@pytest.mark.parametrize("page", ["docs/quickstart.md", "README.md"])
def test_one_batch_with_curl(page, port):
    [block] = [block for block in blocks(page, "sh") if "/generate" in block]
    answers = shell(block, port)
    assert [answer["text"].strip() for answer in answers] == [ANSWERS[name] for name in ("pirate", "sql", None)]


def test_loading_with_curl(port):
    [block] = [block for block in blocks("README.md", "sh") if "/load_lora_adapter" in block]
    assert shell(block, port)["success"] is True


def test_every_block_of_the_shell_is_run_here():
    known = ("/generate", "/load_lora_adapter", "multilora serve")
    for page in ("docs/quickstart.md", "README.md"):
        assert all(any(word in block for word in known) for block in blocks(page, "sh"))


def test_python(port):
    client, offline = blocks("README.md", "python")
    assert output([sys.executable, "-c", here(client, port)]).strip() == ANSWERS["pirate"]
    assert output([sys.executable, "-c", offline]).splitlines()[-1].strip() == ANSWERS["sql"]
