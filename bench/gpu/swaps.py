"""Adapters that come from a trainer as tensors: one that is replaced again and again, and many that come once.

A tensor's way is the whole one: from the trainer's host memory through shared memory into the spool, as
`POST /load_lora_adapter_from_tensors` with `load_format` "shared_memory" does it on a thread, through the loader and
onto the device, until the first token on the new weights. HTTP is left out.
"""

import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from bench.gpu.arrivals import OWN_VERSIONS, Live, abort_all, quantile, stream_gaps
from bench.gpu.setup import Bench
from multilora.adapter_tools.share import SharedAdapter
from multilora.adapters.sources.spool import Spool
from multilora.engine.messages import LoadAdapter, UnloadAdapter
from multilora.server.tensors import LoadTensorsBody

SWAP_RANK = 8
WRITERS = 4  # threads that bring fresh adapters as far as the spool
COMING = 8  # fresh adapters under way at a time
_versions = count(2 * OWN_VERSIONS)  # of their own, beside those of `arrivals.py`


class Trainer:
    """Weights of one rank in host memory, and the shared memory that they go through, one adapter at a time."""

    def __init__(self, bench: Bench, rank: int):
        self._tensors = {name: t.cpu() for name, t in bench.adapters.tensors(f"trainer-{rank}", rank).items()}
        self._config = bench.adapters.config(rank)
        self._shared = SharedAdapter(self._tensors)
        self._lock = Lock()

    def send(self, spool: Spool, version: int) -> Path:
        """What one load call makes: the version's folder in the spool."""
        with self._lock:
            self._shared.write(self._tensors)
            body = LoadTensorsBody.model_validate(self._shared.message("policy", self._config))
            return spool.add(version, body.config_dict, body.writer())

    def close(self) -> None:
        self._shared.close()


class Engine:
    """A live engine whose versions come and go."""

    def __init__(self, bench: Bench):
        self.live = Live(bench.llm.engine)
        [self._prompt] = bench.prompts(1, bench.work.decode_prompt)

    def load(self, version: int, path: Path) -> None:
        self.live.call(LoadAdapter(call=version, version=version, path=str(path), pinned=False))

    def take_loaded(self) -> list[int]:
        """Versions whose load has ended since. Raises RuntimeError if one has failed."""
        replies, self.live.replies = self.live.replies, []
        for reply in replies:
            if not reply.ok:
                raise RuntimeError(f"a load failed: {reply.message}")
        return [reply.call for reply in replies if reply.info is not None]

    def use(self, version: int, number: int) -> str:
        """Ask for one token on the version. Returns the request's id."""
        rid = f"use-{version}-{number}"
        self.live.submit(rid, self._prompt, version, 1)
        return rid

    def unload(self, version: int) -> None:
        self.live.call(UnloadAdapter(version, version))


def swap_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Swaps of one adapter, one after the other, while all other rows decode; what each costs those rows."""
    engine, streams = Engine(bench), bench.work.batch - 1  # the last row is for the request after each swap
    spool, trainer = Spool(), Trainer(bench, SWAP_RANK)
    try:
        _start_streams(bench, engine.live, streams)
        with ThreadPoolExecutor(1) as thread:
            _swap_for(engine, thread, spool, trainer, bench.work.swap_seconds / 6)  # warm up
            calm = _calm_gaps(engine.live, bench.work.swap_seconds / 3)
            start = time.perf_counter()
            taken = _swap_for(engine, thread, spool, trainer, bench.work.swap_seconds)
            swaps_a_second = len(taken) / (time.perf_counter() - start)
        if any(f"stream-{i}" not in engine.live.open for i in range(streams)):
            raise RuntimeError("the streams ended before the last swap: their context is too short")
        gaps = stream_gaps(engine.live, start)
        abort_all(engine.live)
    finally:
        trainer.close()
        spool.close()
    name = f"in-place swaps, rank {SWAP_RANK}, from tensors, {streams} rows decode"
    yield bench.row(name, "swaps/s").show(
        swaps_a_second, swap_ms=quantile(taken, 0.5), swap_p99_ms=quantile(taken, 0.99), swaps=len(taken)
    )
    yield bench.row(f"gap of those rows, 99th percentile: swaps against none, {streams} rows", "ratio").show(
        quantile(gaps, 0.99) / quantile(calm, 0.99),
        1.0,
        gap_p99_ms=quantile(gaps, 0.99),
        gap_max_ms=max(gaps),
        calm_gap_p99_ms=quantile(calm, 0.99),
        calm_gap_max_ms=max(calm),
    )


def _start_streams(bench: Bench, live: Live, streams: int) -> None:
    names = bench.load_group("r16")
    for i, prompt in enumerate(bench.prompts(streams, bench.work.decode_prompt)):
        version = bench.infos[names[i % len(names)]].version
        live.submit(f"stream-{i}", prompt, version, bench.dims.context - bench.work.decode_prompt - 1)
    while any(len(live.times[f"stream-{i}"]) < 3 for i in range(streams)):
        live.step()


def _calm_gaps(live: Live, seconds: float) -> list[float]:
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        live.step()
    return stream_gaps(live, start)


def _swap_for(
    engine: Engine, thread: ThreadPoolExecutor, spool: Spool, trainer: Trainer, seconds: float
) -> list[float]:
    """Swap until `seconds` are over. Returns the milliseconds of each swap: load call to first token."""
    taken: list[float] = []
    current: int | None = None
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        version, start = next(_versions), time.perf_counter()
        sent = thread.submit(trainer.send, spool, version)
        while not sent.done():
            engine.live.step()
        engine.load(version, sent.result())
        while version not in engine.take_loaded():
            engine.live.step()
        rid = engine.use(version, 0)
        while not engine.live.times[rid]:
            engine.live.step()
        taken.append((time.perf_counter() - start) * 1e3)
        _forget(engine, spool, current)
        current = version
    _forget(engine, spool, current)
    return taken


def _forget(engine: Engine, spool: Spool, version: int | None) -> None:
    if version is not None:
        engine.unload(version)
        spool.remove(version)


@dataclass
class _Fresh:
    """Fresh adapters under way, by version. uses: of those whose first or second request runs."""

    sent: dict[int, Future[Path]] = field(default_factory=dict)
    loading: set[int] = field(default_factory=set)
    uses: dict[int, tuple[str, int]] = field(default_factory=dict)  # its request, and which of the two that is
    done: int = 0

    @property
    def coming(self) -> int:
        return len(self.sent) + len(self.loading) + len(self.uses)


def fresh_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Adapters that nobody has seen before, each used twice, one use after the other, then unloaded. Small ranks are
    more frequent: all ranks together bring the same number of bytes. Ends early after `fresh_seconds`."""
    work, engine, spool = bench.work, Engine(bench), Spool()
    trainers = {rank: Trainer(bench, rank) for rank in work.fresh_ranks}
    ranks = random.Random(0).choices(work.fresh_ranks, [1 / rank for rank in work.fresh_ranks], k=work.fresh)
    try:
        with ThreadPoolExecutor(WRITERS) as writers:
            start = time.perf_counter()
            done = _bring_fresh(engine, writers, spool, trainers, ranks, start + work.fresh_seconds)
            seconds = time.perf_counter() - start
    finally:
        for trainer in trainers.values():
            trainer.close()
        spool.close()
    nbytes = sum(bench.dims.adapter_bytes(rank) for rank in ranks[:done])
    name = f"fresh adapters of ranks {min(ranks)} to {max(ranks)} from tensors, each used twice"
    yield bench.row(name, "adapters/s").show(
        done / seconds, adapters=done, wanted=work.fresh, gb=nbytes / 1e9, gb_s=nbytes / 1e9 / seconds
    )


def _bring_fresh(
    engine: Engine,
    writers: ThreadPoolExecutor,
    spool: Spool,
    trainers: dict[int, Trainer],
    ranks: list[int],
    end: float,
) -> int:
    """Returns how many have come and gone by `end`, or all."""
    fresh, waiting = _Fresh(), iter(ranks)
    while True:
        while fresh.coming < COMING and time.perf_counter() < end and (rank := next(waiting, None)) is not None:
            version = next(_versions)
            fresh.sent[version] = writers.submit(trainers[rank].send, spool, version)
        if not fresh.coming:
            return fresh.done
        for version in [version for version, sent in fresh.sent.items() if sent.done()]:
            engine.load(version, fresh.sent.pop(version).result())
            fresh.loading.add(version)
        for version in engine.take_loaded():
            fresh.loading.remove(version)
            fresh.uses[version] = (engine.use(version, 0), 0)
        for version, (rid, number) in list(fresh.uses.items()):
            if rid in engine.live.open:
                continue
            if number == 0:
                fresh.uses[version] = (engine.use(version, 1), 1)
            else:
                del fresh.uses[version]
                _forget(engine, spool, version)
                fresh.done += 1
        engine.live.step()
