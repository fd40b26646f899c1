"""Hostile requests against a running server, and what they cost everybody else.

    python scripts/hostile.py [--url http://127.0.0.1:30000 --pid PID] [SCENARIO …]

Without --url it starts a server over the demo model for each scenario. While a scenario runs, `/health` is asked 50
times a second; printed are the statuses of the hostile requests, the percentiles of those probes (a slow one also
counts for those that it kept from being sent), and by how much the memory of the server's processes has grown. The
exit code is 1 if a probe failed, its p99 was 100 ms or more, memory grew by over 1 GiB, or a hostile request was
answered with a 500.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import psutil

DEADLINE = 30.0  # seconds that a hostile client waits for an answer
PROBE_SECONDS = 0.02
LIMIT_MS, LIMIT_MIB = 100.0, 1536  # of memory 1 GiB is one grammar's limit


@dataclass(frozen=True)
class Target:
    """host, port: of the server; pid: of its front process, whose children are counted too."""

    host: str
    port: int
    pid: int

    def post(self, path: str, body: bytes, timeout: float = DEADLINE) -> int | str:
        """The status of the answer, or how the connection ended."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            return response.status
        except TimeoutError:
            return "timeout"
        except (OSError, http.client.HTTPException):
            return self._early_answer(connection)
        finally:
            connection.close()

    def _early_answer(self, connection: http.client.HTTPConnection) -> int | str:
        """A server that refuses a body before it has been sent answers and closes."""
        try:
            assert connection.sock is not None
            connection.sock.settimeout(2)
            head = connection.sock.recv(64)
            return int(head.split()[1]) if head else "closed"
        except (OSError, ValueError, IndexError, AssertionError):
            return "closed"

    def socket(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=5)

    def rss_mib(self) -> int:
        """Resident memory of the server's processes."""
        total = 0
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += one.memory_info().rss
        return total >> 20


# ---------------------------------------------------------------------- scenarios

Scenario = Callable[[Target], Counter[int | str]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__.replace("_", "-")] = function
    return function


def _generate(target: Target, sampling: dict[str, object] | None = None, **fields: object) -> int | str:
    sampling = {"max_new_tokens": 8} | (sampling or {})
    body = {"sampling_params": sampling} | ({"text": "a"} | fields if "input_ids" not in fields else fields)
    return target.post("/generate", json.dumps(body).encode())


def _together(calls: list[Callable[[], int | str]]) -> Counter[int | str]:
    found: Counter[int | str] = Counter()
    threads = [threading.Thread(target=lambda c=call: found.update([c()])) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@scenario
def long_prompts(target: Target) -> Counter[int | str]:
    """A million tokens as text with and without spaces and as ids, 5 MB of messages."""
    messages = [{"role": "user", "content": "word " * 1_000_000}]
    chat = json.dumps({"messages": messages, "model": "default"}).encode()
    return Counter(
        [
            _generate(target, text="a b " * 1_000_000),
            _generate(target, text="x" * 2_000_000),
            _generate(target, input_ids=[5] * 1_000_000),
            target.post("/v1/chat/completions", chat),
            target.post("/tokenize", json.dumps({"prompt": "a b " * 1_000_000}).encode()),
        ]
    )


@scenario
def many_samples(target: Target) -> Counter[int | str]:
    return Counter([_generate(target, {"n": 10_000}), _generate(target, text=["a"] * 50_000)])


@scenario
def stop_strings(target: Target) -> Counter[int | str]:
    many = [f"{i} never said" for i in range(10_000)]
    return Counter([_generate(target, {"stop": many, "max_new_tokens": 500, "ignore_eos": True})])


@scenario
def stop_expressions(target: Target) -> Counter[int | str]:
    expressions = ["((a{1000}){1000}){1000}", "(?:" * 5000 + "a" + ")" * 5000, "(x+x+)+y", "(?:.?){900}zz", r"(a)\1"]
    options = {"max_new_tokens": 200, "ignore_eos": True}
    return _together([lambda e=e: _generate(target, options | {"stop_regex": e}) for e in expressions])


@scenario
def grammars(target: Target) -> Counter[int | str]:
    """Endless, huge and empty ones side by side."""
    properties = {f"property {i}": {"type": "string"} for i in range(1000)}
    schemas = [
        '{"items":' * 900 + "{}" + "}" * 900,
        '{"type":"array","items":' * 250 + "{}" + "}" * 250,
        json.dumps({"type": "object", "properties": dict(list(properties.items())[:300])}),
        json.dumps({"type": "object", "properties": properties}),
        json.dumps({"enum": [f"value {i}" for i in range(100_000)]}),
        json.dumps({"allOf": [{"type": "object"}, {"required": ["a"]}]}),
    ]
    calls = [lambda s=s: _generate(target, {"json_schema": s}) for s in schemas]
    sources = [{"regex": "((a{1,500}){1,500}){1,500}"}, {"regex": r"[^\s\S]"}, {"ebnf": 'root ::= root "a"'}]
    return _together([*calls, *(lambda s=s: _generate(target, s) for s in sources)])


@scenario
def grammar_hang_ups(target: Target) -> Counter[int | str]:
    """Clients that send slow grammars and leave; then somebody with a quick one."""
    properties = {f"property {i}": {"type": "string"} for i in range(900)}
    body = [
        json.dumps(
            {"text": "a", "sampling_params": {"json_schema": json.dumps({"title": f"{i}", "properties": properties})}}
        )
        for i in range(5)
    ]
    _together([lambda b=b: target.post("/generate", b.encode(), timeout=1) for b in body])
    start = time.perf_counter()
    status = _generate(target, {"regex": "ab?"})
    return Counter([status, f"quick one after {time.perf_counter() - start:.1f} s"])


@scenario
def not_json(target: Target) -> Counter[int | str]:
    numbers = [b"NaN", b"Infinity", b"1e999", b"-Infinity", b"9" * 5000]
    bodies = [b'{"text": "a", "sampling_params": {"temperature": ' + n + b"}}" for n in numbers]
    bodies += [b"[" * 200_000, b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"text": "\xff\xfe"}']
    return Counter(target.post("/generate", body) for body in bodies)


@scenario
def large_bodies(target: Target) -> Counter[int | str]:
    wrong = json.dumps({"messages": [1] * 1_000_000, "model": "default"}).encode()
    return Counter(
        [
            target.post("/v1/chat/completions", wrong, 60),
            target.post("/generate", json.dumps({"text": ["a", 1] * 400_000}).encode(), 60),
            target.post("/generate", b'{"input_ids": [' + b"[1]," * (50 << 20) + b"[1]]}", 60),
            target.post("/generate", b'{"text": "' + b"a" * (200 << 20) + b'"}', 60),
        ]
    )


@scenario
def silent_connections(target: Target) -> Counter[int | str]:
    """500 that say nothing, say half a head or half a body, or read nothing."""
    heads = [
        b"",
        b"POST /generate HTTP/1.1\r\nHost: x\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    ]
    with contextlib.ExitStack() as stack:
        for number in range(500):
            with contextlib.suppress(OSError):
                one = stack.enter_context(target.socket())
                one.sendall(heads[number % 3])
        status = _generate(target)
        time.sleep(5)
    return Counter([status])


@scenario
def header_floods(target: Target) -> Counter[int | str]:
    """Twenty that send headers, a target, a chunk's extension or trailers for as long as they are let."""
    chunked = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    line = b"x-a: " + b"a" * 1000 + b"\r\n"
    floods = [
        (b"GET /health HTTP/1.1\r\n", line),
        (b"GET /", b"a" * 1000),
        (chunked + b"1;a=", b"a" * 1000),
        (chunked + b"0\r\n", line),
    ]

    def flood(begin: bytes, again: bytes) -> int | str:
        end = time.monotonic() + DEADLINE
        with target.socket() as one:
            try:
                one.sendall(begin)
                while time.monotonic() < end:
                    one.sendall(again * 64)
            except OSError:
                return "closed"
        return "timeout"

    return _together([partial(flood, *floods[number % 4]) for number in range(20)])


@scenario
def stalled_streams(target: Target) -> Counter[int | str]:
    """Ten that read nothing for 12 s and then hang up, with as many logprobs as they are given."""
    found: Counter[int | str] = Counter()
    with contextlib.ExitStack() as stack:
        for number in range(10):
            top = 100 if number % 2 else 20
            options = {"max_new_tokens": 450, "ignore_eos": True}
            body = {
                "text": "a",
                "stream": True,
                "return_logprob": True,
                "top_logprobs_num": top,
                "sampling_params": options,
            }
            data = json.dumps(body).encode()
            one = target.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            stack.enter_context(one)
        time.sleep(12)
    found["hung up"] = 10
    time.sleep(3)
    return found


@scenario
def wrong_values(target: Target) -> Counter[int | str]:
    """What has been answered with a 500."""
    kwargs = [
        "add_generation_prompt",
        "tools",
        "messages",
        "self",
        "continue_final_message",
        "conversation",
        "tokenize",
    ]
    chats = [
        {
            "messages": [{"role": "user", "content": "a"}],
            "model": "default",
            "max_tokens": 1,
            "chat_template_kwargs": {k: 1},
        }
        for k in kwargs
    ]
    samplings: list[dict[str, object]] = [
        {"logit_bias": {"9" * 5000: 1}},
        {"stop_regex": "(" * 5000 + ")" * 5000},
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 1e-300},
        {"temperature": 1e39},
        {"temperature": 1e39, "regex": "ab"},
        {"logit_bias": {"1": 1e300}},
    ]
    statuses = [target.post("/v1/chat/completions", json.dumps(chat).encode()) for chat in chats]
    return Counter(statuses + [_generate(target, sampling) for sampling in samplings])


# ---------------------------------------------------------------------- measuring


@dataclass
class Probe:
    """Asks `/health`, each time on a new connection, from a process of its own; one that fails counts as 10 s."""

    target: Target
    ms: list[float] = field(default_factory=list)
    failed: int = 0
    rss: int = 0  # MiB, the most that was seen

    def run(self, stop: threading.Event) -> None:
        """Fill the fields until told to stop."""
        while not stop.wait(PROBE_SECONDS):
            start = time.perf_counter()
            ok = self.ask()
            self.failed += not ok
            self.ms.append((time.perf_counter() - start) * 1000 if ok else 10_000.0)
            if len(self.ms) % 10 == 1:
                self.rss = max(self.rss, self.target.rss_mib())

    def ask(self) -> bool:
        connection = http.client.HTTPConnection(self.target.host, self.target.port, timeout=60)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        where = [self.target.host, str(self.target.port), str(self.target.pid)]
        command = [sys.executable, __file__, "--probe", *where]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        try:
            yield
        finally:
            found, _ = process.communicate()  # closes its stdin, which ends it
            self.ms, self.failed, self.rss = json.loads(found)

    def percentile(self, share: float) -> float:
        """In ms. A slow probe also stands for those that would have been sent meanwhile."""
        step = PROBE_SECONDS * 1000
        found = sorted(ms - k * step for ms in self.ms for k in range(1 + int(ms / step)))
        return found[min(len(found) - 1, int(share * len(found)))]


def measure(name: str, target: Target) -> bool:
    """Run one scenario, print its line, and say whether it stayed within the limits."""
    for _ in range(3):
        _generate(target)
    before, probe, start = target.rss_mib(), Probe(target), time.perf_counter()
    with probe.running():
        statuses = SCENARIOS[name](target)
        time.sleep(1.0)
    grown = max(probe.rss, target.rss_mib()) - before
    good = not probe.failed and probe.percentile(0.99) < LIMIT_MS and grown < LIMIT_MIB and not statuses[500]
    answers = ", ".join(f"{count} × {status}" for status, count in statuses.items())
    health = f"p50 {probe.percentile(0.5):7.1f} p99 {probe.percentile(0.99):8.1f} max {max(probe.ms):8.1f} ms"
    line = f"{name:18} {time.perf_counter() - start:5.1f} s  /health {health}, {probe.failed} failed, +{grown:5d} MiB"
    sys.stdout.write(f"{line}  {'ok ' if good else 'BAD'} {answers}\n")
    sys.stdout.flush()
    return good


@contextlib.contextmanager
def own_server(log: str) -> Iterator[Target]:
    """A server over the demo model on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log, "ab") as file:
        command = [sys.executable, "-m", "multilora", "serve", "--port", str(port)]
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    target = Target("127.0.0.1", port, process.pid)
    try:
        end = time.monotonic() + 120
        while not Probe(target).ask():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start; see {log}")
            time.sleep(0.2)
        yield target
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def probe(host: str, port: str, pid: str) -> int:
    """Measure until stdin is closed, and print what was found."""
    found, stop = Probe(Target(host, int(port), int(pid))), threading.Event()
    thread = threading.Thread(target=found.run, args=(stop,))
    thread.start()
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    sys.stdin.read()
    stop.set()
    thread.join()
    sys.stdout.write(json.dumps([found.ms, found.failed, found.rss]))
    return 0


def main() -> int:
    if sys.argv[1:2] == ["--probe"]:
        return probe(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server (default: one of its own for each scenario)")
    parser.add_argument("--pid", type=int, default=0, help="the running server's process, to measure its memory")
    parser.add_argument("scenario", nargs="*", choices=[[], *SCENARIOS], help="default: all")
    arguments = parser.parse_args()
    good = True
    for name in arguments.scenario or SCENARIOS:
        if arguments.url:
            host, _, port = arguments.url.rpartition("//")[2].rstrip("/").partition(":")
            good &= measure(name, Target(host, int(port or 80), arguments.pid))
            continue
        with own_server(os.path.join(tempfile.gettempdir(), "multilora-hostile.log")) as target:
            good &= measure(name, target)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
