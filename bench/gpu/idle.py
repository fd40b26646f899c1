"""Whether the host keeps the device busy: the share of time in which it is idle, in decode steps and in mixed steps.

And where a step's time goes, in the JSON: the time that each kernel adds, that is, in which none that began before it
is still running (kernels start early and run side by side). By torch's profiler with its device side only; what a
step takes without it stands beside.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.arrivals import Live
from bench.gpu.setup import Bench

TARGET = 0.05
STEPS = 20
MIXED_ANSWER = 12  # tokens, so few that every step has prompts
SHOWN = 16  # kernels in the JSON
NAME = 70  # characters of a kernel's name


@dataclass(frozen=True)
class Profile:
    """The profile of some steps: milliseconds from the first kernel to the end of the last; `busy`: with a kernel
    running."""

    steps: int
    span: float
    busy: float
    kernels: Counter[str]  # milliseconds that each adds, over all steps

    @property
    def idle(self) -> float:
        return 1 - self.busy / self.span

    def largest(self) -> dict[str, float]:
        """Milliseconds per step."""
        return {name: ms / self.steps for name, ms in self.kernels.most_common(SHOWN)}


def idle_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    work = bench.work
    names = bench.load_group("r16")
    versions = [bench.infos[name].version for name in names]
    for kind, prompt, answer, count in (
        ("decode", work.decode_prompt, work.decode_steps + 2 * STEPS, work.batch),
        ("mixed", work.prompt, MIXED_ANSWER, 6 * work.batch),
    ):
        live = Live(bench.llm.engine)
        for i, ids in enumerate(bench.prompts(count, prompt)):
            live.submit(f"{kind}-{i}", ids, versions[i % len(versions)], answer)
        begun = work.batch if kind == "decode" else work.batch // 2
        while sum(len(times) > 2 for times in live.times.values()) < begun:
            live.step()
        plain_ms = timed_ms(live.step, STEPS)
        found = profiled(live.step, STEPS)
        while live.open:
            live.step()
        row = bench.row(f"GPU idle, {kind} steps of {work.batch} distinct rank-16", "ratio", TARGET)
        profiled_ms = found.span / found.steps
        yield row.show(found.idle, step_ms=plain_ms, profiled_ms=profiled_ms, kernels_ms=found.largest())


def timed_ms(step: Callable[[], Any], steps: int) -> float:
    """Milliseconds of one step."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps * 1e3


def profiled(step: Callable[[], Any], steps: int) -> Profile:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name()[:NAME])
        for event in record.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.name().startswith("Memcpy HtoD")
    )
    assert events, "the profiler has seen nothing of the device"
    kernels: Counter[str] = Counter()
    until = events[0][0]
    for start, end, name in events:
        kernels[name] += max(0, end - max(start, until)) / 1e6
        until = max(until, end)
    return Profile(steps, (until - events[0][0]) / 1e6, sum(kernels.values()), kernels)
