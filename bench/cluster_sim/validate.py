"""The simulated cluster against a real one: the same requests at the same times to three replicas of each.

    python -m bench.cluster_sim.validate [--rate 6] [--seconds 40] [--out bench/results/cluster-sim-validation.json]

Needs the extra `ray`. The real replicas have the bundled model on this machine's CPU. What a step and a prompt token
take, and what HTTP and Serve add to a first token, is measured on one of them alone first; nothing is fitted to what
three do. All adapters are everywhere before the clock starts, so what is held against the other is routing, queues
and steps, not loads: those are held against an H200's in `tests/bench/test_cluster_sim.py`.
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
from statistics import median
from typing import Any

import numpy as np

from bench.cluster_client import Cluster, Timed, client_of, ended, generate, ray_here
from bench.cluster_sim.calibration import Calibration, calibrate
from bench.cluster_sim.engine import Sizes
from bench.cluster_sim.routing import AdapterAware
from bench.cluster_sim.simulation import Scenario, Simulation
from bench.cluster_sim.trace import Arrival, Traffic, arrivals, history
from bench.common import environment, finish, say
from multilora.demo import adapter_paths

REPLICAS, ADAPTERS, SLOTS = 3, 24, 16
PROMPT, ANSWER, LONGEST = 48, 24, 160
ALONE = (1, 4, 8)  # requests at a time, while steps are measured
WARM = 0.25  # part of the time that is not counted
QUANTILES = (0.5, 0.9, 0.99)


def trace_of(rate: float, seconds: float) -> tuple[Traffic, list[Arrival]]:
    """What both get."""
    traffic = Traffic(adapters=ADAPTERS, rate=rate, seconds=seconds, prompt=PROMPT, answer=ANSWER)
    found = [
        replace(one, prompt=min(one.prompt, LONGEST), answer=min(one.answer, LONGEST)) for one in arrivals(traffic)
    ]
    return traffic, found


def prompt_of(number: int, length: int) -> list[int]:
    """Tokens of no other prompt."""
    rng = random.Random(number)
    return [rng.randrange(2, 250) for _ in range(length)]


async def steps_of(cluster: Cluster) -> tuple[Calibration, float]:
    """What one replica takes, and seconds that are in a first token beside the engine's."""
    number = 10_000
    async with client_of(cluster) as client:

        async def at_a_time(count: int, prompt: int, tokens: int) -> list[Timed]:
            nonlocal number
            number += count
            made = (
                generate(client, prompt_of(number - i, prompt), f"adapter-{i}", tokens, stream=True)
                for i in range(count)
            )
            return list(await asyncio.gather(*made))

        await at_a_time(8, 16, 16)
        steps = []
        for count in ALONE:
            streams = [one for _ in range(3) for one in await at_a_time(count, 16, 100)]
            steps.append(median((one.ended - one.first) / (one.tokens - 1) for one in streams))
        first = {}
        for length in (16, LONGEST):
            times = [(await at_a_time(1, length, 2))[0] for _ in range(20)]
            first[length] = median(one.first - one.sent for one in times)
    row, fixed = np.polyfit(ALONE, steps, 1)
    per_token = max(0.0, (first[LONGEST] - first[16]) / (LONGEST - 16))
    known = replace(
        calibrate(), decode=(float(max(fixed, 0)), float(max(row, 0)), 0.0, 0.0), per_prompt_token=per_token
    )
    return known, max(0.0, first[16] - known.step(0, 16, 1, 0))


async def replay(cluster: Cluster, trace: Sequence[Arrival]) -> list[Timed]:
    """Send each request at its time."""
    start = time.monotonic()
    async with client_of(cluster) as client:

        async def ask(number: int, one: Arrival) -> Timed:
            await asyncio.sleep(max(0.0, start + one.time - time.monotonic()))
            name = f"adapter-{one.adapter}"
            return await generate(client, prompt_of(number, one.prompt), name, one.answer, stream=True)

        tasks = {asyncio.create_task(ask(number, one)) for number, one in enumerate(trace)}
        found = await ended(tasks, trace[-1].time + 60)
    return [replace(one, sent=one.sent - start, first=one.first - start, ended=one.ended - start) for one in found]


def simulated(
    traffic: Traffic, trace: Sequence[Arrival], calibration: Calibration, overhead: float
) -> dict[str, float]:
    """First tokens and whole requests, in milliseconds, by quantile."""
    scenario = Scenario(
        replicas=REPLICAS, warm=WARM * traffic.seconds, sizes=Sizes(slots=SLOTS), history=history(traffic, 5000)
    )
    measured = Simulation(scenario, calibration, AdapterAware(0, routers=1), trace).run()
    return _quantiles([one + overhead for one in measured.first], [one + overhead for one in measured.seconds])


def _quantiles(first: Sequence[float], whole: Sequence[float]) -> dict[str, float]:
    found = {}
    for name, values in (("first_token", first), ("request", whole)):
        for q in QUANTILES:
            found[f"{name}_p{q * 100:g}_ms"] = round(float(np.quantile(values, q)) * 1e3, 1)
    return found


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    serve = {
        "device": "cpu",
        "skip_tokenizer_init": True,
        "max_running_requests": SLOTS,
        "disable_radix_cache": True,
        "lora_device_bytes": "64MB",
        "lora_host_bytes": "256MB",
        "drain_seconds": 5,
    }
    content = {"state_dir": str(directory), "port": args.port, "cpus": 0.1, "serve": serve}
    cluster = Cluster(content, args.start_seconds)
    cluster.scale(1)
    names = [f"adapter-{i}" for i in range(ADAPTERS)]
    cluster.load(dict(zip(names, cycle(adapter_paths().values()), strict=False)))
    calibration, overhead = asyncio.run(steps_of(cluster))
    say(f"a step {calibration.decode[0] * 1e3:.1f} ms and {calibration.decode[1] * 1e3:.2f} for each request")
    cluster.scale(REPLICAS)
    traffic, trace = trace_of(args.rate, args.seconds)
    asyncio.run(replay(cluster, trace))  # adapters come to where they are asked for
    found = [one for one in asyncio.run(replay(cluster, trace)) if one.sent >= WARM * args.seconds]
    real = _quantiles([one.first - one.sent for one in found], [one.ended - one.sent for one in found])
    model = simulated(traffic, trace, calibration, overhead)
    errors = {name: round(model[name] / real[name] - 1, 3) for name in real}
    for name in real:
        say(f"{name:<22} real {real[name]:8.1f}  simulated {model[name]:8.1f}  error {errors[name]:+.0%}")
    steps = {"decode": calibration.decode, "per_prompt_token": calibration.per_prompt_token, "overhead": overhead}
    shown = {"traffic": asdict(traffic), "requests": len(found), "measured_alone": steps}
    return environment("ray") | shown | {"real": real, "simulated": model, "errors": errors}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster_sim.validate", description=__doc__)
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second, of all replicas")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--start-seconds", type=float, default=300.0, help="for replicas to start")
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
