"""Adapters that have never been loaded: the first token of one, and the effect of their loading on running streams.

Cold means, as for the peers: the load call and everything after it counts, and the file is in the page cache.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from bench.gpu.setup import GREEDY, Bench
from multilora.engine.engine import Engine
from multilora.engine.messages import Abort, LoadAdapter, Outputs, Reply, Submit, UnloadAdapter
from multilora.params import SamplingParams

COLD = {16: (25, 110), 64: (80, 288)}  # rank → (target, best peer), ms over warm
OWN_VERSIONS = 1 << 40  # far above the versions that the registry of `LLM` gives out


def cold_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Load call and first token of a new adapter, minus the first token of the same adapter when warm."""
    for rank, aims in COLD.items():
        cold, warm = [], []
        prompts = bench.prompts(1, bench.work.decode_prompt)
        for i in range(bench.work.cold_runs + 1):
            name = f"cold-{rank}-{i}"
            path = bench.adapters.write(name, rank)
            start = time.perf_counter()
            info = bench.llm.load_lora_adapter(name, path)
            bench.llm.generate(prompts, GREEDY | {"max_new_tokens": 1}, lora_path=name)
            cold.append((time.perf_counter() - start) * 1e3)
            warm.append(bench.timed(prompts, [name], 1) * 1e3)
            bench.llm.unload_lora_adapter(name)
            shutil.rmtree(path)
        link = bench.machine.link
        row = bench.row(f"first token, rank {rank}, cold less warm", "ms", *aims)
        cold_ms, warm_ms = median(cold[1:]), median(warm[1:])  # the first of all also warms up
        limit = info.nbytes / link * 1e3 if link else None
        yield row.show(cold_ms - warm_ms, limit, cold_ms=cold_ms, warm_ms=warm_ms)


class Live:
    """An engine stepped as its own process steps it. times: request id → the time of every token, in seconds."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.times: dict[str, list[float]] = {}
        self.open: set[str] = set()
        self.replies: list[Reply] = []

    def submit(self, rid: str, prompt: list[int], version: int, tokens: int) -> None:
        self.times[rid] = []
        self.open.add(rid)
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_new_tokens=tokens)
        self.engine.handle(Submit(rid=rid, input_ids=prompt, sampling=sampling, adapters=((version, 1.0),)))

    def step(self) -> None:
        if not self.engine.running:
            time.sleep(0.001)
        messages = self.engine.step()
        now = time.perf_counter()
        for message in messages:
            if isinstance(message, Reply):
                self.replies.append(message)
            elif isinstance(message, Outputs):
                for output in message.items:
                    self.times[output.rid] += [now] * len(output.token_ids)
                    if output.finished is not None:
                        self.open.discard(output.rid)

    def call(self, message: LoadAdapter | UnloadAdapter) -> None:
        """Send a message; the reply comes from a later `step`."""
        self.engine.handle(message)


@dataclass
class Arrivals:
    """Times in milliseconds: gaps between successive tokens of the streams, first tokens of the arrived requests."""

    gaps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def __iadd__(self, other: "Arrivals") -> "Arrivals":
        self.gaps += other.gaps
        self.first += other.first
        return self

    @property
    def gap_p99(self) -> float:
        return quantile(self.gaps, 0.99)

    def summary(self, streams: int) -> dict[str, float]:
        return {
            "steps": len(self.gaps) // streams,
            "gap_ms": median(self.gaps),
            "gap_p99_ms": self.gap_p99,
            "gap_max_ms": max(self.gaps),
            "first_token_ms": median(self.first),
            "first_token_p99_ms": quantile(self.first, 0.99),
        }


def streams_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The 99th-percentile gap between tokens of running streams while requests arrive, on adapters that are loaded
    when the request arrives, against the same arrivals on the same adapters once loaded. Both alternate, and all
    rounds are pooled, because it is chance which arrivals share a step."""
    work = bench.work
    paths = bench.adapters.write_all({f"arriving-{i}": 16 for i in range(work.arrivals)})
    cold, warm = Arrivals(), Arrivals()
    p99s = []
    for number in range(work.arrival_rounds):
        once = _round(bench, list(paths.values()), OWN_VERSIONS + number * work.arrivals)
        cold += once[0]
        warm += once[1]
        p99s.append((once[0].gap_p99, once[1].gap_p99))
    for path in paths.values():
        shutil.rmtree(path)
    row = bench.row(f"gap of {work.streams} streams, 99th percentile: cold arrivals against warm", "ratio", 1.2)
    yield row.show(
        cold.gap_p99 / warm.gap_p99,
        1.0,
        cold=cold.summary(work.streams),
        warm=warm.summary(work.streams),
        cold_gap_ms=cold.gap_p99,
        warm_gap_ms=warm.gap_p99,
        rounds=[f"{c:.1f} / {w:.1f} ms" for c, w in p99s],
    )


def _round(bench: Bench, paths: list[str], first_version: int) -> tuple[Arrivals, Arrivals]:
    """Cold arrivals, then warm ones, each beside fresh streams."""
    live = Live(bench.llm.engine)
    versions = [first_version + i for i in range(len(paths))]
    found = []
    for kind, given in (("cold", paths), ("warm", None)):
        _start_streams(bench, live)
        found.append(_arrivals(bench, live, kind, versions, given))
        if any(f"stream-{i}" not in live.open for i in range(bench.work.streams)):
            raise SystemExit("the streams ended before the last arrival: their context is too short for so many")
        abort_all(live)
    for version in versions:
        live.call(UnloadAdapter(version, version))
    while len(live.replies) < len(versions):
        live.step()
    return found[0], found[1]


def _start_streams(bench: Bench, live: Live) -> None:
    work, r16 = bench.work, bench.load_group("r16")
    for i, prompt in enumerate(bench.prompts(work.streams, work.decode_prompt)):
        version = bench.infos[r16[i % len(r16)]].version
        live.submit(f"stream-{i}", prompt, version, bench.dims.context - work.decode_prompt - 1)
    while any(len(live.times[f"stream-{i}"]) < 3 for i in range(work.streams)):
        live.step()
    _arrivals(bench, live, "warm-up", [bench.infos[name].version for name in r16[:4]], paths=None)


def abort_all(live: Live) -> None:
    for rid in live.open:
        live.engine.handle(Abort(rid))
    while live.open:
        live.step()


def _arrivals(bench: Bench, live: Live, phase: str, versions: list[int], paths: list[str] | None) -> Arrivals:
    """Send requests at random times, one per version; with `paths` each loads its adapter first."""
    work = bench.work
    random = torch.Generator().manual_seed(0)
    prompts = bench.prompts(len(versions), work.decode_prompt)
    waits = torch.empty(len(versions)).exponential_(work.arrival_rate, generator=random)
    start = time.perf_counter()
    due = (start + waits.cumsum(0)).tolist()
    rids = [f"{phase}-{i}" for i in range(len(versions))]
    arrived, submitted = 0, 0
    while submitted < len(rids) or not live.open.isdisjoint(rids):
        ready = []
        while arrived < len(rids) and time.perf_counter() >= due[arrived]:
            if paths is None:
                ready.append(arrived)
            else:
                live.call(LoadAdapter(call=arrived, version=versions[arrived], path=paths[arrived], pinned=False))
            arrived += 1
        for reply in live.replies:
            if not reply.ok:
                raise SystemExit(f"loading failed: {reply.message}")
            ready.append(reply.call)
        live.replies.clear()
        for i in ready:
            live.submit(rids[i], prompts[i], versions[i], work.arrival_answer)
            submitted += 1
        live.step()
    first = [(live.times[rid][0] - at) * 1e3 for rid, at in zip(rids, due, strict=True)]
    return Arrivals(stream_gaps(live, start), first)


def stream_gaps(live: Live, since: float) -> list[float]:
    """Gaps between successive tokens of the streams, in milliseconds."""
    gaps: list[float] = []
    for rid, times in live.times.items():
        if rid.startswith("stream"):
            gaps += [(b - a) * 1e3 for a, b in pairwise([t for t in times if t >= since])]
    return gaps


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]
