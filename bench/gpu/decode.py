"""Decode steps through `LLM.generate`, and what LoRA costs a batch that does not use it.

The limit of a step is its bytes at the read bandwidth measured in the same run.
"""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from bench.gpu.setup import Bench
from multilora import LLM

# batch → (target, best peer), ms
BASE = {1: (4.7, 4.80), 64: (5.8, 5.94)}
DISTINCT = {1: (5.3, 7.76), 8: (5.6, 8.70), 32: (6.8, 10.2), 64: (8.0, 12.2)}
ONE, MIXED = {64: (6.4, 9.54)}, {64: (10.0, 18.9)}


def decode_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    batches, last = bench.work.batches, bench.work.batches[-1]
    for batch in (batches[0], last):
        yield _row(bench, "LoRA unused", BASE, [None] * batch, [])
    r16 = bench.load_group("r16")
    for batch in batches:
        yield _row(bench, f"{batch} distinct rank-16", DISTINCT, r16[:batch], [16] * batch)
    yield _row(bench, "one rank-16", ONE, [r16[0]] * last, [16])
    mixed = bench.load_group("mixed")[:last]
    yield _row(bench, f"{last} distinct, ranks 8/16/32/64", MIXED, mixed, bench.work.ranks("mixed")[:last])


def _row(
    bench: Bench, name: str, aims: dict[int, Any], names: Sequence[str | None], ranks: list[int]
) -> dict[str, Any]:
    work, batch = bench.work, len(names)
    limit = bench.step_ms(batch, work.decode_prompt + work.decode_steps / 2, ranks)
    row = bench.row(f"decode, batch {batch}, {name}", "ms", *aims.get(batch, ()))
    return row.show(measured_step_ms(bench, names), limit)


def measured_step_ms(bench: Bench, names: Sequence[str | None]) -> float:
    """Milliseconds of one step: the time of `steps` + 1 tokens minus that of 1 token, over `steps`; the best run."""
    work = bench.work
    prompts = bench.prompts(len(names), work.decode_prompt)
    times = {}
    for tokens in (1, work.decode_steps + 1):
        bench.timed(prompts, names, tokens)
        times[tokens] = min(bench.timed(prompts, names, tokens) for _ in range(work.repeats))
    return (times[work.decode_steps + 1] - times[1]) / work.decode_steps * 1e3


def base_only_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """A batch without adapters on this engine and on one with LoRA switched off, in turns, so that both see the
    machine in the same state; medians."""
    work = bench.work
    steps = 2 * work.decode_steps
    with bench.start_other() as off:
        for batch in (work.batches[0], work.batches[-1]):
            prompts, names = bench.prompts(batch, work.decode_prompt), [None] * batch
            times: dict[LLM, list[float]] = {bench.llm: [], off: []}
            for llm in times:
                bench.timed(prompts, names, steps, llm)
            for _ in range(2 * work.repeats):
                for llm, taken in times.items():
                    first = bench.timed(prompts, names, 1, llm)
                    taken.append((bench.timed(prompts, names, steps + 1, llm) - first) / steps * 1e3)
            on_ms, off_ms = median(times[bench.llm]), median(times[off])
            row = bench.row(f"decode, batch {batch}, base only: LoRA on against off", "ratio", 1.01)
            yield row.show(on_ms / off_ms, 1.0, on_ms=on_ms, off_ms=off_ms)
