"""The tables of a result of `tables.py` as Markdown, and two pictures.

    python -m bench.cluster_sim.report bench/results/cluster-sim-tables.json --bars docs/cluster_sim.svg \
      --lines docs/cluster_sim_loads.svg
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cluster_sim.plot import write_lines, write_plot
from bench.cluster_sim.trace import Traffic
from bench.common import say

VARIED = ("replicas", "adapters", "load", "storage_gbit", "routers", "drift", "diurnal", "failures")
"""Fields of a case that tables are about; those that differ within one become its columns."""


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown."""
    varied = [name for name in VARIED if len({row["case"][name] for row in rows}) > 1]
    columns = [*varied, "router", "first token p50", "p99", "in memory", "files, each request", "lost streams"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        name = row["case"]["routing"]
        p50, p99 = f"{row['first_token_p50_ms']:.1f} ms", f"{row['first_token_p99_ms']:,.1f} ms"
        read = f"{row['fetched_mb_per_request']:.1f} MB"
        cells = [*(f"{row['case'][one]:g}" for one in varied), f"**{name}**" if name == "adapter-aware" else name]
        yield "| " + " | ".join([*cells, p50, p99, f"{row['hit_rate']:.1%}", read, str(row["broken_streams"])]) + " |"


def cheapest(rows: Sequence[dict[str, Any]], most_ms: float) -> dict[str, int | None]:
    """The fewest replicas with which each router's 99th percentile is within `most_ms`; None: none that was tried."""
    names = list(dict.fromkeys(row["case"]["routing"] for row in rows))
    within = {name: [row for row in rows if row["case"]["routing"] == name] for name in names}
    return {
        name: min((row["case"]["replicas"] for row in found if row["first_token_p99_ms"] <= most_ms), default=None)
        for name, found in within.items()
    }


def costs(rows: Sequence[dict[str, Any]], most_ms: float) -> Iterator[str]:
    """Lines of Markdown: what a million tokens of answers cost where `most_ms` is promised, and how much more that is
    than with the adapter-aware router."""
    found, tokens = cheapest(rows, most_ms), rows[0]["rate"] * Traffic().answer * 3600 / 1e6
    least = found.get("adapter-aware")
    yield f"| first tokens within {most_ms:g} ms in 99 % | replicas | replica-hours per million tokens | times |"
    yield "|---|---|---|---|"
    for name, replicas in found.items():
        tried = max(row["case"]["replicas"] for row in rows if row["case"]["routing"] == name)
        many, of = replicas or tried, "" if replicas else "more than "
        times = f"{of}{many / least:.2f}" if least else ""
        yield f"| {name} | {of}{many} | {of}{many / tokens:.4f} | {times} |"


def lines(tables: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """The 99th percentile by load, of each router that has more than one."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in (*tables["headline"], *tables["loads"]):
        point = row["case"]["load"], row["first_token_p99_ms"]
        found.setdefault(row["case"]["routing"], []).append(point)
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster_sim.report", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--bars", type=Path)
    parser.add_argument("--lines", type=Path)
    parser.add_argument(
        "--most-ms", type=float, nargs="+", default=[150.0, 250.0], help="of a first token, for what it costs"
    )
    args = parser.parse_args()
    tables = json.loads(args.result.read_text())["tables"]
    for name, rows in tables.items():
        say("\n".join(["", f"### {name}", "", *table(rows)]))
    if "cost" in tables:
        for most_ms in args.most_ms:
            say("\n".join(["", *costs(tables["cost"], most_ms)]))
    if args.bars:
        if "headline" not in tables:
            parser.error(f"--bars: {args.result} has no table `headline`")
        write_plot(args.bars, {row["case"]["routing"]: row for row in tables["headline"]})
    if args.lines:
        write_lines(args.lines, "first token, 99th percentile (ms), by load", lines(tables))


if __name__ == "__main__":
    main()
