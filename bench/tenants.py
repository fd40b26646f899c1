"""Tenants and adapters that compete, on a real engine: first tokens and throughput under `fair` and `fcfs`.

    python -m bench.tenants [--device cuda] [--only trace] [--out bench/results/tenants.json]

Dummy weights and 40 adapters of rank 16 with distinct random weights, in one engine in this process; its policy is
changed between runs, when it is idle and its prefix cache is empty. On CUDA the model has Llama-3.1-8B's dimensions,
on a CPU 4 M parameters. Two parts:

- trace: one greedy tenant and nine modest ones (`tenant_trace.py`). The rates follow the machine: the greedy tenant
  asks for 1.5 times, each modest one for 3 % of what the engine serves of a burst. "unloaded" is the modest tenants'
  part of the same trace.
- turns: more adapters than places for them, as in sgl-project/sglang#17913 (6 over 3) and #13349 (16 over 8), each
  adapter a tenant. "resident" is the same with a place for each adapter. The rate is 40 % of what that serves.
"""

import argparse
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from bench.common import Row, environment, finish, say
from bench.gpu.setup import scratch_parent
from bench.gpu.sizes import SIZES, Adapters, Dims, write_model
from bench.tenant_trace import ADAPTERS, Arrival, modest_only, p99, trace, turns
from multilora.adapters.loading.loader import InlineLoader
from multilora.config import Config
from multilora.engine.build import build_engine
from multilora.engine.engine import Engine
from multilora.engine.messages import FlushCache, LoadAdapter, Outputs, Submit
from multilora.engine.scheduling.policy import POLICIES, Policy
from multilora.params import SamplingParams

RANK = 16


@dataclass(frozen=True)
class Sizes:
    """slots: --max-running-requests; prompt, answer: tokens, means in the trace; seconds: of arrivals in the trace;
    turns: requests of that part."""

    dims: Dims
    slots: int
    prompt: int
    answer: int
    seconds: float
    turns: int


BY_DEVICE = {
    "cuda": Sizes(SIZES["llama-8b"][0], slots=64, prompt=256, answer=64, seconds=10.0, turns=60),
    "cpu": Sizes(Dims(256, 512, 4, 8, 4, 32, 4000, 1024), slots=16, prompt=48, answer=24, seconds=8.0, turns=60),
}
TURNS = {"17913": (6, 3), "13349": (16, 8)}  # SGLang's issue -> adapters, places

IMPLEMENTATIONS = dict(POLICIES)


class Switched:
    """A policy that hands every call to another one, which can be exchanged while no request is unfinished."""

    def __init__(self, *arguments: Any):
        self._arguments = arguments
        self.use("fcfs")

    def use(self, name: str) -> None:
        self._policy: Policy = IMPLEMENTATIONS[name](*self._arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


@dataclass(frozen=True)
class Run:
    """first: seconds from arrival to the first token, of each request in order; seconds: until all had ended."""

    first: list[float]
    seconds: float
    tokens: int

    @property
    def rate(self) -> float:
        """Generated tokens a second, over all tenants."""
        return self.tokens / self.seconds

    def of_modest(self, arrivals: Sequence[Arrival]) -> list[float]:
        return [first for first, one in zip(self.first, arrivals, strict=True) if not one.greedy]


class World:
    """One engine with all adapters loaded; it has run each of them."""

    def __init__(self, directory: Path, device: str, sizes: Sizes):
        self.sizes = sizes
        config = Config.make(
            model_path=write_model(directory / "model", sizes.dims),
            load_format="dummy",
            skip_tokenizer_init=True,
            device=device,
            enable_lora=True,
            schedule_policy="fcfs",
            max_running_requests=sizes.slots,
            random_seed=0,
        )
        with patch.dict(POLICIES, {"fcfs": Switched}):
            self.engine: Engine = build_engine(config, None if device == "cuda" else InlineLoader)
        files = Adapters(directory, sizes.dims, torch.device(device))
        paths = files.write_all({f"a{i}": RANK for i in range(ADAPTERS)})
        for i, path in enumerate(paths.values(), start=1):
            self.engine.handle(LoadAdapter(call=i, version=i, path=path))
        while self.engine.busy:
            self.engine.step()
        self.replay([Arrival(0.0, "warm-up", i, sizes.prompt, 2) for i in range(ADAPTERS)], "fcfs")
        gc.collect()
        gc.freeze()

    def replay(self, arrivals: Sequence[Arrival], policy: str, places: int | None = None) -> Run:
        """Let all requests arrive when it is their time, and run until the last has ended. places: most adapters on
        the device, None for all."""
        engine, switched = self.engine, self.engine.scheduler.policy
        assert not engine.busy and isinstance(switched, Switched)
        switched.use(policy)
        engine.set_lora_limits(None, places)
        engine.handle(FlushCache(call=0))
        start, came = time.perf_counter(), 0
        first: dict[str, float] = {}
        while came < len(arrivals) or engine.busy:
            now = time.perf_counter() - start
            while came < len(arrivals) and arrivals[came].seconds <= now:
                engine.handle(self._submit(came, arrivals[came]))
                came += 1
            for message in engine.step():
                if isinstance(message, Outputs):
                    for output in message.items:
                        assert output.finished is None or output.finished.type == "length", output.finished
                        first.setdefault(output.rid, time.perf_counter() - start)
            if not engine.running and came < len(arrivals):
                time.sleep(min(0.001, max(0.0, arrivals[came].seconds - (time.perf_counter() - start))))
        seconds = time.perf_counter() - start
        waits = [first[str(i)] - one.seconds for i, one in enumerate(arrivals)]
        return Run(waits, seconds, sum(one.answer for one in arrivals))

    def capacity(self, adapters: int, prompt: int, answer: int) -> float:
        """Requests a second of a burst that fills all slots twice."""
        burst = [Arrival(0.0, "burst", i % adapters, prompt, answer) for i in range(2 * self.sizes.slots)]
        return len(burst) / self.replay(burst, "fcfs").seconds

    def _submit(self, number: int, one: Arrival) -> Submit:
        vocab = self.sizes.dims.vocab - 3
        return Submit(
            rid=str(number),
            input_ids=[3 + (number * 31 + i * 7) % vocab for i in range(one.prompt)],
            sampling=SamplingParams(temperature=0, max_new_tokens=one.answer, ignore_eos=True),
            adapters=((one.adapter + 1, 1.0),),
            tenant=one.tenant,
        )


def trace_rows(world: World) -> list[dict[str, Any]]:
    """What modest tenants wait and what all get, by policy."""
    sizes = world.sizes
    rate = world.capacity(ADAPTERS, sizes.prompt, sizes.answer)
    arrivals = trace(sizes.seconds, 1.5 * rate, 0.03 * rate, prompt=sizes.prompt, answer=sizes.answer)
    modest = modest_only(arrivals)
    say(f"trace: {len(arrivals)} requests in {sizes.seconds:g} s, {len(modest)} of modest tenants")
    waits = {"unloaded": world.replay(modest, "fair").first}
    rates = {}
    for policy in ("fair", "fcfs"):
        run = world.replay(arrivals, policy)
        waits[policy], rates[policy] = run.of_modest(arrivals), run.rate
    rows = [
        Row(f"modest tenants' first token p99, {name}", "ms").show(
            p99(first) * 1e3, median_ms=median(first) * 1e3, requests=len(first)
        )
        for name, first in waits.items()
    ]
    rows += [Row(f"all tenants, {policy}", "tokens/s").show(value) for policy, value in rates.items()]
    over = p99(waits["fair"]) / p99(waits["unloaded"])
    rows.append(Row("modest tenants' first token p99, fair over unloaded", "ratio", 2.0).show(over))
    rows.append(Row("throughput, fair over fcfs", "of fcfs", 0.97).show(rates["fair"] / rates["fcfs"]))
    return rows


def turns_rows(world: World) -> list[dict[str, Any]]:
    """First tokens where adapters take turns on the device."""
    sizes, rows = world.sizes, []
    for issue, (adapters, places) in TURNS.items():
        prompt, answer = 2 * sizes.prompt, 2 * sizes.answer
        rate = 0.4 * world.capacity(adapters, prompt, answer)
        arrivals = turns(sizes.turns, rate, adapters, prompt=prompt, answer=answer)
        for name, policy, limit in (("resident", "fair", None), ("fair", "fair", places), ("fcfs", "fcfs", places)):
            run = world.replay(arrivals, policy, limit)
            row = Row(f"sglang#{issue}, {adapters} adapters over {places} places, first token p99, {name}", "ms")
            rows.append(row.show(p99(run.first) * 1e3, median_ms=median(run.first) * 1e3, tokens_s=run.rate))
    return rows


PARTS = {"trace": trace_rows, "turns": turns_rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=BY_DEVICE, default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="trace, turns")
    parser.add_argument("--seconds", type=float, help="of arrivals in the trace")
    parser.add_argument("--turns", type=int, help="requests of each case of that part")
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    sizes = BY_DEVICE[args.device]
    sizes = replace(sizes, seconds=args.seconds or sizes.seconds, turns=args.turns or sizes.turns)
    result, started = environment(), time.perf_counter()
    directory = Path(tempfile.mkdtemp(prefix="multilora-bench-", dir=scratch_parent()))
    try:
        world = World(directory, args.device, sizes)
        result["seconds"] = {"start": round(time.perf_counter() - started, 1)}
        result["workload"] = (
            f"{ADAPTERS} adapters of rank {RANK}, {sizes.slots} slots, prompts of {sizes.prompt} and answers of "
            f"{sizes.answer} tokens (means of the trace; twice as long where adapters take turns)"
        )
        try:
            result["rows"] = [row for part in args.only for row in PARTS[part](world)]
        finally:
            world.engine.close()
            gc.unfreeze()
    finally:
        shutil.rmtree(directory)
    result["seconds"]["all"] = round(time.perf_counter() - started, 1)
    finish(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
