"""The simulated cluster against a real one: the same requests at the same times to three replicas of each.

    python -m bench.cluster_sim.validate [--load 0.5] [--seconds 60] [--out bench/results/cluster-sim-validation.json]

Needs the extra `ray`. The real replicas have the bundled model on this machine's CPU, whose cores they share with
each other, with Serve and with the clients. What steps take on one of them and on more, and what HTTP and Serve add
to a first token, is measured before and after (`machine.py`); nothing is fitted to the requests that are replayed.
All adapters are everywhere before the clock starts, so what is held against the other is routing, queues and steps,
not loads: those are held against an H200's in `tests/bench/test_cluster_sim.py`.
"""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from bench.cluster_client import Cluster, Timed, client_of, ended, generate, ray_here
from bench.cluster_sim import machine
from bench.cluster_sim.engine import Sizes
from bench.cluster_sim.machine import Machine, prompt_of
from bench.cluster_sim.routing import AdapterAware
from bench.cluster_sim.simulation import Scenario, Simulation
from bench.cluster_sim.trace import Arrival, Traffic, arrivals, history
from bench.common import environment, finish, say
from multilora.demo import adapter_paths

REPLICAS, ADAPTERS, SLOTS = 3, 24, 16
PROMPT, ANSWER, LONGEST = 48, 24, 160
LATE_SECONDS = 60
WARM = 0.25  # part of the time that is not counted
QUANTILES = (0.5, 0.9, 0.99)


def trace_of(rate: float, seconds: float) -> tuple[Traffic, list[Arrival]]:
    """What both get."""
    traffic = Traffic(adapters=ADAPTERS, rate=rate, seconds=seconds, prompt=PROMPT, answer=ANSWER)
    found = [
        replace(one, prompt=min(one.prompt, LONGEST), answer=min(one.answer, LONGEST)) for one in arrivals(traffic)
    ]
    return traffic, found


def rate_of(known: Machine, load: float) -> float:
    """Requests a second that are so much of what the replicas can do together, by what was measured."""
    seconds = ANSWER * known.step(SLOTS, REPLICAS) + PROMPT * known.calibration.per_prompt_token * SLOTS
    return load * REPLICAS * SLOTS / seconds


async def replay(cluster: Cluster, trace: Sequence[Arrival]) -> list[Timed]:
    """Send each request at its time."""
    start = time.monotonic()
    async with client_of(cluster) as client:

        async def ask(number: int, one: Arrival) -> Timed:
            await asyncio.sleep(max(0.0, start + one.time - time.monotonic()))
            name = f"adapter-{one.adapter}"
            return await generate(client, prompt_of(number, one.prompt), name, one.answer, stream=True)

        tasks = {asyncio.create_task(ask(number, one)) for number, one in enumerate(trace)}
        found = await ended(tasks, trace[-1].time + LATE_SECONDS)
    if len(found) < len(trace):
        raise TimeoutError(f"{len(trace) - len(found)} requests have not ended {LATE_SECONDS} s after the last came")
    return [replace(one, sent=one.sent - start, first=one.first - start, ended=one.ended - start) for one in found]


def simulated(traffic: Traffic, trace: Sequence[Arrival], known: Machine) -> dict[str, float]:
    """First tokens and whole requests, in milliseconds, by quantile."""
    scenario = Scenario(
        replicas=REPLICAS, warm=WARM * traffic.seconds, sizes=Sizes(slots=SLOTS), history=history(traffic, 5000),
        shared_cores=known.shared, way=median(known.beside[0]),
    )  # fmt: skip
    measured = Simulation(scenario, known.calibration, AdapterAware(0, routers=1), trace).run()
    crowded = min(1.0, mean(measured.busy) / (REPLICAS - 1))
    rng = random.Random(0)

    def beside() -> float:
        return rng.choice(known.beside[rng.random() < crowded])

    return _quantiles([one + beside() for one in measured.first], [one + beside() for one in measured.seconds])


def _quantiles(first: Sequence[float], whole: Sequence[float]) -> dict[str, float]:
    found = {}
    for name, values in (("first_token", first), ("request", whole)):
        found[f"{name}_mean_ms"] = round(mean(values) * 1e3, 1)
        for q in QUANTILES:
            found[f"{name}_p{q * 100:g}_ms"] = round(float(np.quantile(values, q)) * 1e3, 1)
    return found


def contents(directory: Path, port: int) -> dict[str, Any]:
    """What cluster.yaml would say."""
    serve = {
        "device": "cpu",
        "skip_tokenizer_init": True,
        "max_running_requests": SLOTS,
        "disable_radix_cache": True,
        "lora_device_bytes": "64MB",
        "lora_host_bytes": "256MB",
        "drain_seconds": 5,
    }
    return {"state_dir": str(directory), "port": port, "cpus": 0.1, "serve": serve}


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Both halves. The simulated one goes by the mean of what was measured before and after the real one."""
    cluster = Cluster(contents(directory, args.port), args.start_seconds)
    cluster.scale(REPLICAS)
    names = [f"adapter-{i}" for i in range(ADAPTERS)]
    cluster.load(dict(zip(names, cycle(adapter_paths().values()), strict=False)))
    before = asyncio.run(machine.measure(cluster, REPLICAS, ADAPTERS, LONGEST))
    traffic, trace = trace_of(rate_of(before, args.load), args.seconds)
    say(f"{_told(before)}; {traffic.rate:.2f} requests a second come")
    asyncio.run(replay(cluster, trace[: len(trace) // 2]))  # adapters come to where they are asked for
    found = [one for one in asyncio.run(replay(cluster, trace)) if one.sent >= WARM * args.seconds]
    after = asyncio.run(machine.measure(cluster, REPLICAS, ADAPTERS, LONGEST))
    say(f"{_told(after)} afterwards")
    real = _quantiles([one.first - one.sent for one in found], [one.ended - one.sent for one in found])
    model = simulated(traffic, trace, before.mean_with(after))
    errors = {name: round(model[name] / real[name] - 1, 3) for name in real}
    for name in real:
        say(f"{name:<22} real {real[name]:8.1f}  simulated {model[name]:8.1f}  error {errors[name]:+.0%}")
    shown = {"traffic": asdict(traffic), "requests": len(found), "load": args.load}
    shown |= {"before": before.row(), "after": after.row()}
    return environment("ray") | shown | {"real": real, "simulated": model, "errors": errors}


def _told(known: Machine) -> str:
    steps = ", ".join(f"{known.step(1, busy) * 1e3:.1f}" for busy in range(1, REPLICAS + 1))
    return f"a step takes {steps} ms while one, two, three replicas compute"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster_sim.validate", description=__doc__)
    parser.add_argument("--load", type=float, default=0.5, help="part of what the replicas can do together")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--start-seconds", type=float, default=600.0, help="for replicas to start")
    parser.add_argument("--port", type=int, default=18_401)
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="multilora-bench-"))
    try:
        with ray_here():
            result = measure(args, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    finish(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
