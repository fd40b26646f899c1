"""What asks a cluster that runs: it is started on this machine, gets its adapters, and then requests.

Used by `bench.cluster` and by the simulator's `validate`. Knows nothing of what is measured.
"""

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from multilora.cluster.running import PROXY_SECONDS

POLL_SECONDS = 0.5
RAY_STARTS = 3
REQUEST_SECONDS = 120.0
GENERATED = "sglang:generation_tokens_total"


@contextlib.contextmanager
def ray_here() -> Iterator[None]:
    """Ray and Serve on this machine, until the end. Ray gives its own processes 30 s to start, which a busy machine
    may not keep: it is tried `RAY_STARTS` times."""
    os.environ.setdefault(*PROXY_SECONDS)
    import ray
    from ray import serve

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for left in reversed(range(RAY_STARTS)):
        before = set(psutil.Process().children(recursive=True))
        try:
            ray.init(num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False)
            break
        except Exception:  # Ray raises no narrower one
            _end_children(before)
            if not left:
                raise
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def _end_children(but: set[psutil.Process]) -> None:
    """Processes that a start has left that failed: Ray does not end them."""
    for process in set(psutil.Process().children(recursive=True)) - but:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass
class Cluster:
    """A cluster of this machine. content: what cluster.yaml says, without the replicas."""

    content: Mapping[str, Any]
    wait_seconds: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.content['port']}"

    def scale(self, replicas: int) -> float:
        """Have so many replicas that serve. Returns the seconds that took."""
        from multilora.cluster import running
        from multilora.cluster.cluster_config import ClusterConfig

        start = time.monotonic()
        running.start(ClusterConfig.make({**self.content, "replicas": replicas}))
        while len(seen := self.samples(GENERATED)) != replicas:
            if time.monotonic() - start > self.wait_seconds:
                raise TimeoutError(f"{replicas} replicas were asked for, {sorted(seen)} are there")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - start

    def samples(self, metric: str) -> dict[str, float]:
        """A metric's values by replica, summed over its other labels."""
        found = Counter[str]()
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            name, _, rest = line.partition("{")
            if name == metric:
                replica = rest.partition('replica="')[2].partition('"')[0]
                found[replica] += float(line.rpartition(" ")[2])  # type: ignore[assignment]
        return dict(found)

    def load(self, paths: Mapping[str, Path]) -> None:
        """Load adapters, name → directory. Raises RuntimeError."""
        with httpx.Client(base_url=self.url, timeout=REQUEST_SECONDS) as client:
            for name, path in paths.items():
                answer = client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
                if answer.status_code != 200:
                    raise RuntimeError(f"{name} was not loaded: {answer.text[:300]}")


@dataclass(frozen=True)
class Timed:
    """One request that has ended. sent, first, ended: seconds of the clock; first: of the first token, where it is a
    stream; tokens: of the answer."""

    sent: float
    first: float
    ended: float
    tokens: int


async def generate(
    client: httpx.AsyncClient,
    prompt: list[int],
    adapter: str,
    tokens: int,
    *,
    stream: bool = False,
    session: str = "",
) -> Timed:
    """Ask for exactly so many tokens. session: its requests go to one replica. Raises RuntimeError for whatever is no
    answer."""
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens}
    body = {"input_ids": prompt, "lora_path": adapter, "sampling_params": sampling, "stream": stream}
    headers = {"X-Session-Id": session} if session else {}
    sent = time.monotonic()
    first = 0.0
    async with client.stream("POST", "/generate", json=body, headers=headers) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code} {(await answer.aread()).decode()[:300]}")
        async for piece in answer.aiter_bytes():
            if b'"error"' in piece and stream:
                raise RuntimeError(piece.decode(errors="replace")[:300])
            first = first or time.monotonic()
    return Timed(sent, first, time.monotonic(), tokens)


def client_of(cluster: Cluster) -> httpx.AsyncClient:
    """A client with as many connections as it has requests."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
    return httpx.AsyncClient(base_url=cluster.url, timeout=REQUEST_SECONDS, limits=limits)


async def ended(tasks: set["asyncio.Task[Timed]"], seconds: float) -> list[Timed]:
    """Those that end within so many seconds; the others are cancelled. Raises the first error."""
    done, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return [task.result() for task in done]
