"""Short connections on every kind of route beside streams, while front processes are killed, and at last the server.

    python -m scripts.hostile.hammer [--seconds 60] [--front-workers 2]

Three phases over one server: nothing is killed; a front process is killed every few seconds; the supervisor is
killed. Printed is for each phase how many requests of each route ended how. The exit code is 1 if there was a 5xx
before the supervisor's end (a 503 after it is right), a request that took over 30 s, one that was cut in the first
phase, one of the server's processes that outlived it, or if `/load` did not end at 0.
"""

import argparse
import contextlib
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from multilora.demo import adapter_paths
from scripts.hostile.target import Target, own_server

WORKER = "multilora.server.workers.worker"
DEADLINE = 30.0
RESTART_SECONDS = 120.0
"""For a process to serve again on a machine that many share; half of new connections wait for it."""
QUIET, KILLED, ENDED = "nothing is killed", "front processes are killed", "the server is killed"
GETS = ("/health", "/v1/models", "/metrics", "/load", "/server_info", "/ready", "/openapi.json", "/nothing")
POSTS: dict[str, object] = {
    "/tokenize": {"prompt": "a"},
    "/load_lora_adapter": {"lora_name": 5, "lora_path": "x" * 200_000},
    "/unload_lora_adapter": {"lora_name": "never loaded"},
    "/flush_cache": None,
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 4}},
    "/v1/embeddings": {"model": "never loaded", "input": "a" * 100_000},
    "/nothing": {"a": "b" * 200_000},
}


@dataclass
class Hammer:
    """What its threads have found so far."""

    target: Target
    stop: threading.Event = field(default_factory=threading.Event)
    found: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    def one(self, method: str, path: str, body: object = None, leave_after: int | None = None) -> str:
        """How one request on a connection of its own ended; leave_after: so many bytes the client hangs up."""
        start = time.monotonic()
        connection = http.client.HTTPConnection(self.target.host, self.target.port, timeout=RESTART_SECONDS)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read(leave_after)
            ended = str(response.status)
            if leave_after is None and path == "/generate" and b'"error"' in text and ended == "200":
                ended = "200 with an error"
        except TimeoutError:
            ended = "timeout"
        except (OSError, http.client.HTTPException) as error:
            ended = type(error).__name__
        finally:
            connection.close()
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.found[f"{path} {ended}"] += 1
        return ended

    def gets(self) -> None:
        self.one("GET", random.choice(GETS))

    def posts(self) -> None:
        path = random.choice(list(POSTS))
        self.one("POST", path, POSTS[path])

    def streams(self) -> None:
        options = {"max_new_tokens": random.randint(2, 60), "ignore_eos": True}
        body = {"stream": True, "text": "a", "sampling_params": options}
        self.one("POST", "/generate", body, random.choice([None, None, 1, 2000]))

    def loads(self) -> None:
        name = f"a{random.random()}"
        path = str(adapter_paths()["json"])
        if self.one("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": path}) == "200":
            self.one("POST", "/generate", {"text": "a", "lora_path": name, "sampling_params": {"max_new_tokens": 2}})
            self.one("POST", "/unload_lora_adapter", {"lora_name": name})

    def run(self, beside: Callable[[], None]) -> None:
        """All threads until `beside` has ended."""
        work = [self.gets] * 6 + [self.posts] * 4 + [self.streams] * 4 + [self.loads] * 2
        threads = [threading.Thread(target=self._repeat, args=(one,)) for one in work]
        for thread in threads:
            thread.start()
        beside()
        self.stop.set()
        for thread in threads:
            thread.join()

    def _repeat(self, one: Callable[[], None]) -> None:
        while not self.stop.is_set():
            one()

    def faults(self, phase: str) -> list[str]:
        """Ends that should not be."""
        return [end for end in self.found if not _right(phase, end.split(" ")[1], " with an error" in end)]


def _right(phase: str, ended: str, error: bool) -> bool:
    if ended == "timeout" or ended == "500":
        return False
    if phase == ENDED:
        return True
    return int(ended) < 500 and not error if ended.isdecimal() else phase == KILLED


def _workers(target: Target) -> list[psutil.Process]:
    found = []
    for one in psutil.Process(target.pid).children():
        with contextlib.suppress(psutil.Error):
            if WORKER in one.cmdline():
                found.append(one)
    return found


def _kill_workers(target: Target, seconds: float, log: Path) -> None:
    """One after the other, whenever all of them serve; at least two."""
    end, killed = time.monotonic() + seconds, 0
    while killed < 2 or time.monotonic() < end:
        time.sleep(1)
        workers = _workers(target)
        if len(workers) > 1 and log.read_text().count(" serves\n") >= len(workers) + killed:
            random.choice(workers).kill()
            killed += 1
    _say(f"{killed} were killed")
    time.sleep(2)


def _load(target: Target) -> str:
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection(target.host, target.port, timeout=DEADLINE)
        try:
            connection.request("GET", "/load")
            return connection.getresponse().read().decode()
        finally:
            connection.close()
    return "no answer"


def _idle(target: Target) -> bool:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if _load(target) == '{"server_load":0}':
            return True
        time.sleep(0.2)
    return False


def phase(target: Target, name: str, beside: Callable[[], None]) -> bool:
    """One phase: print what it found, and say whether it is good."""
    hammer = Hammer(target)
    hammer.run(beside)
    faults = hammer.faults(name)
    idle = name == ENDED or _idle(target)
    good = not faults and idle and hammer.slowest < (RESTART_SECONDS if name == KILLED else DEADLINE)
    load = "" if name == ENDED else f", /load then {'0' if idle else _load(target)}"
    total = hammer.found.total()
    _say(f"{'ok ' if good else 'BAD'} {name}: {total} requests, the slowest {hammer.slowest:.1f} s{load}")
    _say("    " + ", ".join(f"{count} × {end}" for end, count in sorted(hammer.found.items())))
    for fault in faults:
        _say(f"    BAD {hammer.found[fault]} × {fault}")
    return good


def hammer(target: Target, seconds: float, workers: int, log: Path) -> bool:
    """All phases; the server, whose log that is, is dead afterwards."""
    good = phase(target, QUIET, lambda: time.sleep(seconds))
    if workers > 1:
        good &= phase(target, KILLED, lambda: _kill_workers(target, seconds / 2, log))
    family = psutil.Process(target.pid).children(recursive=True)

    def kill() -> None:
        time.sleep(2)
        psutil.Process(target.pid).kill()
        time.sleep(3)

    good &= phase(target, ENDED, kill)
    _, alive = psutil.wait_procs(family, DEADLINE)
    _say(f"{'BAD' if alive else 'ok '} processes that outlive it: {len(alive)} of {len(family)}")
    return good and not alive


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--front-workers", type=int, default=2)
    arguments = parser.parse_args()
    log = Path(tempfile.mkdtemp()) / "multilora-hammer.log"
    flags = ("--enable-lora", "--front-workers", str(arguments.front_workers))
    with own_server(str(log), "--device", "cpu", *flags) as target:
        return 0 if hammer(target, arguments.seconds, arguments.front_workers, log) else 1


if __name__ == "__main__":
    sys.exit(main())
