"""The tables of docs/cluster.md: one experiment after the other, each written as soon as it is there.

    python -m bench.cluster_sim.tables --out bench/results/cluster-sim-tables.json [--only headline loads]

What they share is in `BASE`: 100 replicas, adapters of ranks 8 to 64 whose files come over 25 Gbit/s per replica,
four ingresses, tiers as they are after 50 requests for each adapter, 15 s that are not counted and 30 s that are.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.cluster_sim.__main__ import capacity
from bench.cluster_sim.calibration import Calibration, calibrate
from bench.cluster_sim.engine import Sizes
from bench.cluster_sim.routing import ROUTINGS
from bench.cluster_sim.simulation import Scenario, Simulation
from bench.cluster_sim.trace import Traffic, arrivals, history
from bench.common import environment

GBIT = 1e9 / 8
AWARE = "adapter-aware"
ALL = tuple(ROUTINGS)
THREE = (AWARE, "round robin", "ideal")
PER_REPLICA = 100  # adapters, where both grow together


@dataclass(frozen=True)
class Case:
    """One run. load: part of what ideal replicas can do, all together; rate: requests a second instead, 0: as `load`
    says. routers: ingresses of the adapter-aware router. history: requests for each adapter before."""

    routing: str = AWARE
    replicas: int = 100
    adapters: int = 10_000
    load: float = 0.8
    rate: float = 0.0
    storage_gbit: float = 25.0
    routers: int = 4
    drift: float = 0.0
    diurnal: float = 0.0
    failures: int = 0
    history: int = 50
    warm: float = 15.0
    seconds: float = 45.0
    seed: int = 0


BASE = Case()


def headline(_most: float) -> Iterator[Case]:
    for routing in ALL:
        yield replace(BASE, routing=routing)


def seeds(_most: float) -> Iterator[Case]:
    """The headline with other requests, and other draws of the routers."""
    for seed in (1, 2):
        for routing in THREE:
            yield replace(BASE, routing=routing, seed=seed)


def loads(_most: float) -> Iterator[Case]:
    for load in (0.5, 0.6, 0.7, 0.85, 0.9, 0.95):
        for routing in THREE:
            yield replace(BASE, routing=routing, load=load)


def storages(_most: float) -> Iterator[Case]:
    for gbit in (0.0, 12.5):
        for routing in THREE:
            yield replace(BASE, routing=routing, storage_gbit=gbit)


def ingresses(_most: float) -> Iterator[Case]:
    for routers in (1, 16, 64):
        yield replace(BASE, routers=routers)


def sizes(_most: float) -> Iterator[Case]:
    for replicas in (1, 10):
        for routing in ALL:
            yield replace(BASE, routing=routing, replicas=replicas, adapters=PER_REPLICA * replicas)


def drift(_most: float) -> Iterator[Case]:
    """A tenth of the adapters change places each minute, of which there are two."""
    for routing in ALL:
        yield replace(BASE, routing=routing, drift=0.1, seconds=120.0, replicas=20, adapters=2000)


def diurnal(_most: float) -> Iterator[Case]:
    """Between 60 and 140 % of the mean rate, which is 60 % of what they can do; one day is what is counted."""
    for routing in (AWARE, "round robin", "ideal", "least loaded"):
        yield replace(BASE, routing=routing, load=0.6, diurnal=0.4, seconds=75.0, replicas=20, adapters=2000)


def failures(_most: float) -> Iterator[Case]:
    """Two of twenty replicas die."""
    for routing in ALL:
        yield replace(BASE, routing=routing, failures=2, load=0.7, seconds=90.0, replicas=20, adapters=2000)


def cost(most: float) -> Iterator[Case]:
    """The traffic of 20 replicas at 80 %, on more and fewer of them."""
    base = replace(BASE, adapters=2000, rate=0.8 * 20 * most, history=25, warm=10.0, seconds=35.0)
    tried = {AWARE: (17, 18, 19, 20), "ideal": (17, 18, 19, 20), "plain hash": (20, 80)}
    for routing in ALL:
        for replicas in tried.get(routing, (20, 24, 28, 32, 40)):
            yield replace(base, routing=routing, replicas=replicas)


def small(_most: float) -> Iterator[Case]:
    """Loads, on 20 replicas."""
    for load in (0.5, 0.7, 0.8, 0.9, 0.95):
        for routing in (AWARE, "round robin", "least loaded", "ideal"):
            yield replace(
                BASE, routing=routing, load=load, replicas=20, adapters=2000, history=25, warm=10.0, seconds=40.0
            )


def crowd(_most: float) -> Iterator[Case]:
    """More adapters than all hosts hold."""
    for routing in ALL:
        yield replace(BASE, routing=routing, adapters=100_000, history=5)


def thousand(_most: float) -> Iterator[Case]:
    """As many requests are counted in five seconds as with 100 replicas in fifty."""
    base = replace(BASE, replicas=1000, adapters=100_000, history=15, warm=3.0, seconds=8.0)
    for routing in (AWARE, "round robin", "ideal", "least loaded", "random", "plain hash"):
        yield replace(base, routing=routing)


EXPERIMENTS = {
    one.__name__: one
    for one in (
        headline,
        seeds,
        loads,
        storages,
        ingresses,
        sizes,
        drift,
        diurnal,
        failures,
        cost,
        small,
        crowd,
        thousand,
    )
}


def measure(case: Case, most: float, calibration: Calibration) -> dict[str, Any]:
    """The row of one run."""
    start, counted = time.perf_counter(), case.seconds - case.warm
    rate = case.rate or case.load * most * case.replicas
    traffic = Traffic(
        adapters=case.adapters, rate=rate, seconds=case.seconds, drift=case.drift, diurnal=case.diurnal,
        period=counted if case.diurnal else 120.0, seed=case.seed,
    )  # fmt: skip
    scenario = Scenario(
        replicas=case.replicas, warm=case.warm, failures=case.failures, ideal=case.routing == "ideal", seed=case.seed,
        sizes=Sizes(storage_rate=case.storage_gbit * GBIT),
        history=() if case.routing == "ideal" else history(traffic, case.history * case.adapters),
    )  # fmt: skip
    options: dict[str, Any] = {"routers": case.routers} if case.routing == AWARE else {}
    simulation = Simulation(scenario, calibration, ROUTINGS[case.routing](case.seed, **options), arrivals(traffic))
    row = simulation.run().row()
    return {"case": vars(case).copy(), "rate": round(rate), **row, "wall_s": round(time.perf_counter() - start, 1)}


def run(names: Sequence[str], out: Path) -> None:
    """Measure and write; what the file has of other experiments stays."""
    calibration = calibrate()
    most = capacity(Traffic(seed=0), Sizes(), calibration)
    found = json.loads(out.read_text()) if out.exists() else {}
    found |= environment() | {"replica_at_most": most}
    for name in names:
        rows: list[dict[str, Any]] = []
        for case in EXPERIMENTS[name](most):
            rows.append(measure(case, most, calibration))
            one = rows[-1]
            what = f"{name:<10} {case.routing:<14} replicas {case.replicas} load {case.load}"
            found_out = f"hits {one['hit_rate']:.1%}  files {one['fetched_mb_per_request']} MB"
            print(f"{what} p99 {one['first_token_p99_ms']} ms  {found_out}  {one['wall_s']} s", flush=True)
            found.setdefault("tables", {})[name] = rows
            out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster_sim.tables", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    run(args.only, args.out)


if __name__ == "__main__":
    main()
