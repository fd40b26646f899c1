"""Every point at which a running server was once broken, tried again on real servers over the demo model.

    python -m scripts.hostile.points [--front-workers N] [N …]

For each point: what was sent and what came back, and in its first line how long `/health` took at most and by how
much the memory of the server's processes grew meanwhile (where one server is attacked all along). The exit code is 1
if something came back that should not, `/health` failed or took a second, or memory grew by more than 1.5 GiB.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from scripts.hostile.points import access, adapters, engines, inputs, processes, wire  # noqa: F401 - they fill POINTS
from scripts.hostile.points.record import Point, Record, chosen, generate
from scripts.hostile.target import Target, own_server
from scripts.hostile.witness import witness

HEALTH_MS, GROWTH_MIB = 1000.0, 1536
FEW_DESCRIPTORS = ("bash", "-c", 'ulimit -Sn 64; exec "$0" "$@"')
"""How servers are started: with a soft limit that they raise."""


def attack(point: Point, record: Record, target: Target, health_ms: float = HEALTH_MS) -> str:
    """Do one point's work on a server, watched, and return what was noticed."""
    assert point.work is not None
    generate(target)
    before = target.rss_mib()
    with witness("probe", target) as found:
        point.work(target, record)
    grown = max(found.rss, target.rss_mib()) - before
    slowest = max(found.ms)
    if found.failed or slowest >= health_ms:
        record.note("/health meanwhile", f"{found.failed} failed, at most {slowest:.0f} ms", False)
    if grown >= GROWTH_MIB:
        record.note("memory", f"+{grown} MiB", False)
    return f"/health max {slowest:5.0f} ms, +{grown:4d} MiB"


def measure(point: Point, record: Record, target: Target | None = None, health_ms: float = HEALTH_MS) -> bool:
    """Do one point, on this server or on servers of its own, print its lines, and say whether it is good."""
    start, noticed = time.perf_counter(), ""
    try:
        if target is not None:
            noticed = attack(point, record, target, health_ms)
        else:
            assert point.alone is not None
            point.alone(record)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - one point that cannot go on keeps no other from being tried
        record.note("the point itself", f"{type(error).__name__}: {error}", False)
    verdict = "ok " if record.good else "BAD"
    lines = [f"{point.number:2d} {verdict} {point.name:44} {time.perf_counter() - start:5.1f} s  {noticed}"]
    lines += [f"      {'' if good else 'BAD '}{sent}: {got}" for good, sent, got in record.lines]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    return record.good


def measure_all(points: list[Point], flags: tuple[str, ...], log: str, health_ms: float = HEALTH_MS) -> list[bool]:
    """Those that want a server with the same flags share one."""
    results = []
    for wanted in sorted({point.flags for point in points if point.work}):
        with own_server(log, "--device", "cpu", *flags, *wanted, prefix=FEW_DESCRIPTORS) as target:
            together = [point for point in points if point.work and point.flags == wanted]
            results += [measure(point, Record(flags, log), target, health_ms) for point in together]
    alone = [point for point in points if point.alone]
    return results + [measure(point, Record(flags, log)) for point in alone]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--front-workers", type=int, default=1)
    parser.add_argument("point", type=int, nargs="*", help="default: all")
    arguments = parser.parse_args()
    flags = () if arguments.front_workers == 1 else ("--front-workers", str(arguments.front_workers))
    log = str(Path(tempfile.gettempdir()) / "multilora-points.log")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the servers
    return 0 if all(measure_all(chosen(arguments.point), flags, log)) else 1


if __name__ == "__main__":
    sys.exit(main())
