"""Which flag to set: what else the same GPU could do with other limits, found by trying them in the simulation.

Called by `planner.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multilora.errors import OutOfMemory
from multilora.memory.plan import format_bytes

if TYPE_CHECKING:
    from multilora.planner.planner import Planner

RUNNING = (32, 64, 128, 256)
CHUNKS = (512, 1024, 4096)
WORTH = 1.05  # a flag is named if it makes at least so much of a difference


@dataclass(frozen=True)
class Advice:
    """One thing to do. flag: as typed, or "" where none helps."""

    flag: str
    why: str


def advise(planner: "Planner", rps: float) -> list[Advice]:
    """What is worth setting at this rate, the most important first."""
    return [*_too_much(planner, rps), *_adapters(planner), *_running(planner), *_kv(planner), *_chunks(planner, rps)]


def _too_much(planner: "Planner", rps: float) -> Iterator[Advice]:
    if rps > planner.most_rps:
        ranks = planner.workload.tp_size
        count = math.ceil(rps / planner.most_rps) * ranks
        whose = "one GPU's" if ranks == 1 else f"the {ranks} GPUs'"
        yield Advice("", f"{rps:.4g} requests a second are more than {whose} {planner.most_rps:.3g}: take {count}")


def _adapters(planner: "Planner") -> Iterator[Advice]:
    memory, wanted = planner.capacity, planner.workload.adapters
    need = wanted * memory.adapter_bytes * planner.workload.tp_size
    if memory.host_adapters is not None and memory.host_adapters < wanted:
        yield Advice(
            "--max-loaded-loras",
            f"host memory holds {memory.host_adapters} of {wanted} adapters, which need {format_bytes(need)}: load "
            "the others when they are named (--lora-resolver-dir)",
        )
    if memory.device_adapters < wanted:
        yield Advice(
            "--lora-host-bytes",
            f"{memory.device_adapters} of {wanted} adapters fit the GPU beside running requests; the others are "
            f"copied when they are asked for, {planner.copy_seconds * 1e3:.2g} ms each, from {format_bytes(need)} of "
            "host memory",
        )


def _running(planner: "Planner") -> Iterator[Advice]:
    """The number of requests in a step that gives most tokens, if that is another one."""
    best, most = planner, planner.saturated.tokens_per_second
    for running in RUNNING:
        other = planner.with_limits(max_running_requests=running)
        try:
            tokens = other.saturated.tokens_per_second
        except OutOfMemory:
            continue
        if tokens > most * WORTH:
            best, most = other, tokens
    if best is not planner:
        yield Advice(
            f"--max-running-requests {best.workload.max_running_requests}",
            f"{most:,.0f} tokens a second at most instead of {planner.saturated.tokens_per_second:,.0f}, for a gap "
            f"between tokens of {_gap(best):.3g} ms instead of {_gap(planner):.3g}",
        )


def _kv(planner: "Planner") -> Iterator[Advice]:
    """Half the bytes for keys and values, where the arena is what limits."""
    if planner.bound != "memory" or planner.workload.kv_cache_dtype != "auto":
        return
    smaller = planner.with_model(kv_cache_dtype="fp8_e4m3")
    before, tokens = planner.saturated.tokens_per_second, smaller.saturated.tokens_per_second
    if tokens > before * WORTH:
        yield Advice(
            "--kv-cache-dtype fp8_e4m3",
            f"twice as many tokens fit: {tokens:,.0f} tokens a second at most instead of {before:,.0f}",
        )


def _gap(planner: "Planner") -> float:
    """Milliseconds of a usual step with all slots taken."""
    seconds = sorted(planner.saturated.step_seconds)
    return seconds[len(seconds) // 2] * 1e3


def _chunks(planner: "Planner", rps: float) -> Iterator[Advice]:
    """The prompt tokens in a step that give the shortest wait for the first token, if that is another number."""
    now = planner.at(min(rps, planner.most_rps))
    best, shortest = None, now.first_token_p99
    for tokens in CHUNKS:
        other = planner.with_limits(chunked_prefill_size=tokens)
        try:
            found = other.at(now.rps)
        except OutOfMemory:
            continue
        if found.first_token_p99 * WORTH < shortest:
            best, shortest = found, found.first_token_p99
            flag = f"--chunked-prefill-size {tokens}"
    if best is not None:
        yield Advice(
            flag,
            f"99 of 100 first tokens within {shortest * 1e3:.3g} ms instead of {now.first_token_p99 * 1e3:.3g}, gaps "
            f"between tokens within {best.gap_p99 * 1e3:.3g} ms instead of {now.gap_p99 * 1e3:.3g}",
        )
