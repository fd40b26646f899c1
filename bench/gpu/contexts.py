"""Long prompts, long contexts and large batches: how far each is from what the hardware needs for it.

The limit of a prompt is its operations at the matrix rate measured in the same run, causal attention included; that
of a decode step its bytes at the read bandwidth.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from bench.gpu.sampling import steady_step_ms
from bench.gpu.setup import Bench

# (target, best peer): none of the peers was measured in these shapes
PROMPTS = {(2048, 0): 46.0, (2048, 1): 48.5, (32768, 0): 1150.0}
CONTEXTS = {(16, 0): 9.3, (16, 16): 10.0, (4, 0): 9.0, (4, 4): 9.8}
LARGE = {(128, 0): 5.9, (128, 64): 8.2, (256, 0): 8.2, (256, 64): 11.0}
THROUGHPUT = {0: 7600.0, 64: 6900.0}


def prompts_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Milliseconds from a prompt to its first token, alone."""
    adapter = bench.load_group("r16")[0]
    for length in bench.work.long_prompts:
        prompts = bench.prompts(1, length)
        for names in ([None], [adapter]):
            bench.timed(prompts, names, 1)
            best = min(bench.timed(prompts, names, 1) for _ in range(2 * bench.work.repeats))
            what = "one rank-16" if names[0] else "LoRA unused"
            row = bench.row(
                f"prompt of {length} tokens, {what}", "ms", PROMPTS.get((length, len([*filter(None, names)])))
            )
            yield row.show(best * 1e3, least_prompt_ms(bench, length))


def least_prompt_ms(bench: Bench, length: int) -> float:
    """Of all matrices but the head, and of scores and sums of which causal attention needs half."""
    dims = bench.dims
    attention = 2 * length**2 * dims.heads * dims.head_dim * dims.layers
    return (2 * length * dims.parameters + attention) / bench.tp_size / bench.machine.matmul * 1e3


def contexts_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Decode steps of few requests with long texts."""
    r16 = bench.load_group("r16")
    for batch, length in bench.work.contexts:
        for names in ([None] * batch, r16[:batch]):
            yield _decode(bench, names, length, f"of {length} tokens each, ", CONTEXTS)


def shared_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Decode steps of a full batch whose prompts begin with the same tokens, which lie in the prefix cache: read for
    each by itself, and once for all (--enable-cascade-attention). Base model only."""
    work, (common, own) = bench.work, bench.work.shared
    batch, steps = work.batch, work.decode_steps
    begin = bench.prompts(1, common)[0]
    prompts = [begin + rest for rest in bench.prompts(batch, own)]
    least = bench.step_ms(batch, own + steps / 2 + common / batch, [])
    for cascade in (False, True):
        options = {"disable_radix_cache": False, "enable_cascade_attention": cascade}
        with bench.start_other(**options, max_total_tokens=2 * (common + batch * (own + 2 * steps + 32))) as llm:
            bench.timed(prompts[:1], [None], 1, llm)
            times = {
                tokens: min(bench.timed(prompts, [None] * batch, tokens, llm) for _ in range(work.repeats))
                for tokens in (1, steps + 1)
            }
            how = "as a cascade" if cascade else "each by itself"
            row = bench.row(f"decode, batch {batch}, {common} tokens shared, {how}", "ms")
            yield row.show((times[steps + 1] - times[1]) / steps * 1e3, least)


def large_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Decode steps of more requests than there are adapters, and throughput of as many at a time."""
    work = bench.work
    r16 = bench.load_group("r16")
    for batch in work.large_batches:
        for names in ([None] * batch, [r16[i % len(r16)] for i in range(batch)]):
            yield _decode(bench, names, work.decode_prompt, "", LARGE)
    batch = work.large_batches[-1]
    prompts = bench.prompts(2 * batch, work.prompt)
    for taken in (0, len(r16)):
        names = [r16[i % taken] if taken else None for i in range(2 * batch)]
        bench.timed(prompts[:batch], names[:batch], 4)
        seconds = bench.timed(prompts, names, work.answer)
        what = f"{taken} distinct rank-16" if taken else "LoRA unused"
        row = bench.row(f"throughput, {batch} running, {what}", "tokens/s", THROUGHPUT.get(taken))
        yield row.show(2 * batch * work.answer / seconds)


def low_ranks_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Decode steps on adapters of the ranks that reinforcement learning takes."""
    batch, ranks = bench.work.batch, [1, 2, 4, 8]
    names = [f"low-{i}" for i in range(min(batch, bench.work.adapters))]
    bench.load({name: ranks[i % 4] for i, name in enumerate(names) if name not in bench.infos})
    rows = [names[i % len(names)] for i in range(batch)]
    versions = [bench.infos[name].version for name in rows]
    least = bench.step_ms(batch, bench.work.decode_prompt, [ranks[i % 4] for i in range(len(names))])
    row = bench.row(f"decode, batch {batch}, {len(names)} distinct, ranks 1/2/4/8", "ms")
    yield row.show(_best(bench, versions, bench.work.decode_prompt), least)


def _decode(
    bench: Bench, names: Sequence[str | None], length: int, what: str, targets: dict[tuple[int, int], float]
) -> dict[str, Any]:
    batch, taken = len(names), len({*names} - {None})
    versions = [None if name is None else bench.infos[name].version for name in names]
    least = bench.step_ms(batch, length + bench.work.decode_steps / 2, [16] * taken)
    which = f"{taken} distinct rank-16" if taken else "LoRA unused"
    row = bench.row(f"decode, batch {batch}, {what}{which}", "ms", targets.get((batch, taken)))
    return row.show(_best(bench, versions, length), least)


def _best(bench: Bench, versions: Sequence[int | None], length: int) -> float:
    return min(steady_step_ms(bench, versions, length) for _ in range(2))
