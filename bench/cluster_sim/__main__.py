"""Compare routers on one traffic: a table, JSON, and a plot."""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.cluster_sim.calibration import Calibration, calibrate
from bench.cluster_sim.engine import Sizes
from bench.cluster_sim.plot import write_plot
from bench.cluster_sim.routing import ROUTINGS, LeastLoaded
from bench.cluster_sim.simulation import Scenario, Simulation
from bench.cluster_sim.trace import Traffic, arrivals, history
from bench.common import environment


def capacity(traffic: Traffic, sizes: Sizes, calibration: Calibration) -> float:
    """Requests a second that one replica ends at most, with every adapter on the device."""
    traffic = replace(traffic, rate=120.0, seconds=20.0, diurnal=0.0, drift=0.0)
    scenario = Scenario(replicas=1, warm=4.0, sizes=sizes, ideal=True)
    simulation = Simulation(scenario, calibration, LeastLoaded(0), arrivals(traffic))
    simulation.run()
    return simulation.ended_before(traffic.seconds) / (traffic.seconds - 4.0)


def compare(
    names: list[str], traffic: Traffic, scenario: Scenario, calibration: Calibration, routers: int
) -> dict[str, dict[str, float]]:
    """The measured row of each router. routers: ingress processes of the adapter-aware one."""
    trace, rows = arrivals(traffic), {}
    for name in names:
        options: dict[str, Any] = {"routers": routers} if name == "adapter-aware" else {}
        routing = ROUTINGS[name](scenario.seed, **options)
        start = time.perf_counter()
        measured = Simulation(replace(scenario, ideal=name == "ideal"), calibration, routing, trace).run()
        rows[name] = measured.row() | {"wall_s": round(time.perf_counter() - start, 1)}
        say(name, rows[name])
    return rows


def say(name: str, row: dict[str, float]) -> None:
    tiers = f"{row['hit_rate']:6.1%} (device {row['device_hit_rate']:6.1%})"
    print(
        f"{name:<14} first token p50 {row['first_token_p50_ms']:9.1f}  p99 {row['first_token_p99_ms']:9.1f} ms   "
        f"hits {tiers}   files {row['fetched_mb_per_request']:6.1f} MB a request   "
        f"{row['unfinished']:.0f} unfinished   {row['wall_s']:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster_sim", description=__doc__)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--load", type=float, default=0.8, help="part of what ideal replicas can do")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--warm", type=float, default=45.0, help="seconds that are not counted")
    parser.add_argument(
        "--history", type=int, default=0, help="requests for each adapter that have come before, without their times"
    )
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument(
        "--drift", type=float, default=0.0, help="part of the adapters that change places each minute"
    )
    parser.add_argument("--diurnal", type=float, default=0.0, help="amplitude of the rate, 0 to 1")
    parser.add_argument("--failures", type=int, default=0)
    parser.add_argument("--routers", type=int, default=4, help="ingress processes of the adapter-aware router")
    parser.add_argument("--device-gb", type=float, default=32.0)
    parser.add_argument("--host-gb", type=float, default=64.0)
    parser.add_argument(
        "--storage-gb-s", type=float, default=0.0, help="what a replica gets of files (default: a disk of its own)"
    )
    parser.add_argument("--policy", default="fair", help="--schedule-policy of the replicas")
    parser.add_argument("--only", nargs="+", choices=list(ROUTINGS), default=list(ROUTINGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG of the rows")
    args = parser.parse_args()
    calibration = calibrate()
    sizes = Sizes(
        device_bytes=args.device_gb * 1e9,
        host_bytes=args.host_gb * 1e9,
        policy=args.policy,
        storage_rate=args.storage_gb_s * 1e9,
    )
    traffic = Traffic(
        adapters=args.adapters, seconds=args.seconds, zipf=args.zipf, drift=args.drift, diurnal=args.diurnal,
        period=args.seconds - args.warm, seed=args.seed,
    )  # fmt: skip
    most = capacity(traffic, sizes, calibration)
    traffic = replace(traffic, rate=args.load * most * args.replicas)
    print(f"{most:.1f} requests a second of one replica at most; {traffic.rate:.0f} come", flush=True)
    scenario = Scenario(
        replicas=args.replicas, warm=args.warm, failures=args.failures, sizes=sizes, seed=args.seed,
        history=history(traffic, args.history * args.adapters),
    )  # fmt: skip
    rows = compare(args.only, traffic, scenario, calibration, args.routers)
    result = environment() | {
        "calibration": asdict(calibration) | {"largest_error": round(calibration.error(), 4)},
        "traffic": asdict(traffic),
        "scenario": asdict(replace(scenario, history=())),
        "history": args.history,
        "routers": args.routers,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        write_plot(args.plot, rows)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
