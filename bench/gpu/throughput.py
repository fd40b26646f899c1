"""Throughput of closed batches through `LLM.generate`, in output tokens a second.

The limit: all prompts at the matrix rate and all decode steps at the read bandwidth measured in the same run.
"""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.common import say
from bench.gpu.setup import GREEDY, Bench, scratch_parent
from bench.gpu.sizes import AttentionAdapters

# (target, best peer), tokens/s
BASE, ONE, DISTINCT, MIXED = (5150, 5150), (4800, 3344), (4300, 3153), (3900, 2430)
FEW_PLACES, MANY = (3300, 2140), (4000, None)


def throughput_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    count = bench.work.adapters
    yield _row(bench, "LoRA unused", BASE, [None], [])
    r16 = bench.load_group("r16")
    yield _row(bench, "one rank-16 adapter", ONE, r16[:1], [16])
    yield _row(bench, f"{count} distinct rank-16", DISTINCT, r16, [16] * count)
    mixed = bench.load_group("mixed")
    yield _row(bench, f"{count} distinct, ranks 8/16/32/64", MIXED, mixed, bench.work.ranks("mixed"))


def few_places_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The adapters of r16, or SGLang's 16, take turns in a device tier that has slots for a few of them."""
    work = bench.work
    r16 = bench.load_group("r16")
    bench.llm.set_lora_limits(lora_device_bytes=work.slots * bench.infos[r16[0]].nbytes, max_loras_per_batch=None)
    try:
        for count, aims in ((work.adapters, FEW_PLACES), (2 * work.slots, ())):
            name = f"{count} distinct rank-16, --lora-device-bytes of {work.slots}"
            if count <= len(r16) and (aims or count != work.adapters):
                yield _row(bench, name, aims, r16[:count], [16] * work.slots, slots=work.slots)
    finally:
        bench.llm.set_lora_limits(lora_device_bytes=None, max_loras_per_batch=None)


def _row(
    bench: Bench, name: str, aims: tuple, adapters: Sequence[str | None], ranks: list[int], slots: int | None = None
) -> dict[str, Any]:
    """Requests take the adapters in turn. ranks: those of the adapters that can be in one step."""
    work = bench.work
    prompts = bench.prompts(work.requests, work.prompt)
    names = [adapters[i % len(adapters)] for i in range(work.requests)]
    bench.timed(prompts[: work.batch], names[: work.batch], 4)
    before = bench.adapter_loads()
    seconds = bench.timed(prompts, names, work.answer)
    together = work.batch
    if slots is not None:
        together = min(together, slots * work.requests // len(adapters))
    limit = work.requests * work.answer / least_seconds(bench, work.requests, together, ranks[:together])
    row = bench.row(f"throughput, {name}", "tokens/s", *aims)
    loads = bench.adapter_loads() - before
    return row.show(work.requests * work.answer / seconds, limit, adapter_loads=loads)


def slora_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """What very many adapters cost, by S-LoRA's recipe (Sheng et al. 2023, section 7): rank 8 on the projections of
    attention, prompts and answers of 8 to 512 tokens, adapters asked for by a power law. Its own loss is 5.5 %, at
    2,000 adapters of a Llama-7B on an A100 of 80 GB.
    """
    work, llm = bench.work, bench.llm
    few, many = work.slora
    names = [f"slora-{i}" for i in range(many)]
    with TemporaryDirectory(dir=scratch_parent()) as directory:
        bench.load(dict.fromkeys(names, 8), AttentionAdapters(Path(directory), bench.dims, bench.machine.device))
    rng = random.Random(0)
    lengths = [
        (rng.randint(*work.slora_lengths), rng.randint(*work.slora_lengths)) for _ in range(work.slora_requests)
    ]
    prompts = [
        ids[:n] for ids, (n, _) in zip(bench.prompts(len(lengths), work.slora_lengths[1]), lengths, strict=True)
    ]
    rates = {}
    for count in (few, many):
        weights = [1 / (i + 1) for i in range(count)]
        taken = rng.choices(names[:count], weights, k=len(lengths))
        params = [GREEDY | {"max_new_tokens": answer} for _, answer in lengths]
        llm.generate(prompts[: work.batch], params[: work.batch], lora_path=taken[: work.batch])
        start = time.perf_counter()
        llm.generate(prompts, params, lora_path=taken)
        rates[count] = sum(answer for _, answer in lengths) / (time.perf_counter() - start)
        yield bench.row(f"throughput, S-LoRA's recipe, {count} adapters", "tokens/s").show(rates[count])
    lost = (1 - rates[many] / rates[few]) * 100
    row = bench.row(f"throughput, S-LoRA's recipe, {many} adapters of {few}", "of 1", 0.945)
    yield row.show(rates[many] / rates[few], lost_percent=lost)


def least_seconds(bench: Bench, requests: int, together: int, ranks: list[int]) -> float:
    """The fewest seconds of a closed batch of which `together` run at a time, on adapters of these ranks."""
    work, dims = bench.work, bench.dims
    prompts = requests * work.prompt * 2 * dims.parameters / bench.tp_size / bench.machine.matmul
    steps = requests * (work.answer - 1) / together
    return prompts + steps * bench.step_ms(together, work.prompt + work.answer / 2, ranks) / 1e3


def many_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """A request for each of very many rank-8 adapters, twice over. All are in host memory, some fit the device."""
    work, llm = bench.work, bench.llm
    names = [f"many-{i}" for i in range(work.many)]
    start = time.perf_counter()
    bench.load(dict.fromkeys(names, 8))
    loading = time.perf_counter() - start
    gib = sum(bench.infos[name].nbytes for name in names) / (1 << 30)
    say(f"wrote and loaded {work.many} adapters, {gib:.1f} GiB, in {loading:.1f} s")
    llm.set_lora_limits(lora_device_bytes=work.many_device_bytes, max_loras_per_batch=None)
    try:
        prompts = bench.prompts(work.many, work.prompt)
        bench.timed(prompts[: work.batch], names[: work.batch], 4)
        before = bench.adapter_loads()
        times = [bench.timed(prompts, names, work.answer) for _ in range(2)]
    finally:
        llm.set_lora_limits(lora_device_bytes=None, max_loras_per_batch=None)
    done = work.many * work.answer
    limit = done / least_seconds(bench, work.many, work.batch, [8] * work.batch)
    row = bench.row(f"throughput, {work.many} requests, as many rank-8 adapters, twice", "tokens/s", *MANY)
    yield row.show(
        2 * done / sum(times),
        limit,
        first_pass=done / times[0],
        second_pass=done / times[1],
        adapter_loads=bench.adapter_loads() - before,
        host_gib=gib,
        loading_seconds=loading,
    )
