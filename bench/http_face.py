"""The HTTP face alone: tokens a second and added latency per token of one front process, with a fake engine.

    python -m bench.http_face [--streams 64 256 1024] [--route completions] [--front-workers 2]
        [--out bench/results/http-face.json]

Beside it, in turns, a bare Starlette stream: the same uvicorn, loop and parser, which sends ready-made frames
(`http_servers.py`). The client (`http_streams.py`) is this process; with fewer than two free cores the tokens a
second are too low, those of a CPU second are not. With --front-workers N the face needs N + 2 cores, for itself, its
supervisor and the client; its CPU seconds are those of all its processes.

- tokens/s: steps as fast as they are taken, at most two ahead
- latency: a step each 100 ms; from the step to the token's frame at the client
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.common import Row, environment, finish, say
from bench.http_streams import Streams

PERIOD_SECONDS = 0.1
ROUTES = {
    "completions": ("/v1/completions", '"prompt":"Once"', b'"text":"'),
    "chat": ("/v1/chat/completions", '"messages":[{"role":"user","content":"Once"}]', b'"content":" the"'),
}


@dataclass
class Server:
    """A running server of `http_servers.py`."""

    port: int
    process: "subprocess.Popen[str]"

    def tick(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("t")
        self.process.stdin.flush()

    def cpu_seconds(self) -> tuple[float, float]:
        """Of the process itself, and of those that it has started."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("c")
        self.process.stdin.flush()
        own, children = self.process.stdout.readline().split()
        return float(own), float(children)


@contextmanager
def started(name: str, streams: int, workers: int) -> Iterator[Server]:
    command = [sys.executable, "-m", "bench.http_servers", name, str(streams), str(workers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(int(process.stdout.readline()), process)
        finally:
            process.kill()


@dataclass(frozen=True)
class Measured:
    """rate: tokens a second; cpu_rate: of the server's CPU time; own_cpu: seconds of it for a token in the process
    that the client has started, the supervisor where there are several; delays: seconds of each token, paced."""

    rate: float
    cpu_rate: float
    own_cpu: float
    delays: list[float]


def measure(name: str, streams: int, route: str, tokens: int, paced_steps: int, workers: int = 1) -> Measured:
    """tokens: of all streams together, after a tenth as many for warming up."""
    path, prompt, marker = ROUTES[route]
    body = f'{{"model":"base",{prompt},"max_tokens":500000,"stream":true,"temperature":0}}'.encode()
    head = f"POST {path} HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    if name == "bare":
        marker = b'"text":"'
    with started(name, streams, workers) as server:
        client = Streams(server.port, head.encode() + body, marker, server.tick)
        client.open(streams)
        steps = max(2, tokens // streams)
        client.run(max(2, steps // 10))
        before = server.cpu_seconds()
        seconds = client.run(steps)
        own, children = (now - then for now, then in zip(server.cpu_seconds(), before, strict=True))
        delays = client.paced(paced_steps, PERIOD_SECONDS)
        client.close()
    count = steps * streams
    return Measured(count / seconds, count / (own + children), own / count, delays)


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def rows(
    streams: int, route: str, rounds: int, tokens: int, paced_steps: int, workers: int = 1
) -> list[dict[str, Any]]:
    """The medians of each server over the rounds, which take turns."""
    runs: dict[str, list[Measured]] = {"face": [], "bare": []}
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(measure(name, streams, route, tokens, paced_steps, workers if name == "face" else 1))

    def middle(name: str, value: Callable[[Measured], float]) -> float:
        return median(value(run) for run in runs[name])

    label = f"{route}, {streams} streams" + (f", {workers} front processes" if workers > 1 else "")
    rate, limit = (middle(name, lambda m: m.rate) for name in ("face", "bare"))
    cpu, cpu_limit = (middle(name, lambda m: m.cpu_rate) for name in ("face", "bare"))
    out = [
        Row(f"{label}", "tokens/s", 40_000).show(rate, limit),
        Row(f"{label}, of a CPU second", "tokens/s", 40_000).show(cpu, cpu_limit),
        Row(f"{label}, of the bare stream's", "of bare", 0.7).show(cpu / cpu_limit, wall=rate / limit),
    ]
    if workers > 1:
        own = middle("face", lambda m: m.own_cpu)
        out.append(Row(f"{label}, CPU of the supervisor for a token", "us").show(own * 1e6, of_all=own * cpu))
    for part in (0.5, 0.99):
        face, bare = (median(percentile(run.delays, part) for run in runs[name]) * 1e3 for name in ("face", "bare"))
        row = Row(f"{label}, p{part * 100:g} from step to token", "ms")
        out.append(row.show(face, bare=bare, added=face - bare))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--route", nargs="+", choices=ROUTES, default=["completions"])
    parser.add_argument("--front-workers", type=int, default=1, help="processes of the face")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200_000, help="of all streams, in a round")
    parser.add_argument("--paced-steps", type=int, default=30)
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    result = environment("uvicorn", "starlette", "uvloop", "httptools")
    result["rows"] = [
        row
        for route in args.route
        for streams in args.streams
        for row in rows(streams, route, args.rounds, args.tokens, args.paced_steps, args.front_workers)
    ]
    say("")
    finish(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
