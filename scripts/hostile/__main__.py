"""Hostile requests against a running server, and what they cost everybody else.

    python -m scripts.hostile [--url http://127.0.0.1:30000 --pid PID] [SCENARIO …]
    python -m scripts.hostile --together 60 [--rounds 3] [SCENARIO …]

Without --url it starts a server over the demo model for each scenario. While a scenario runs, `/health` is asked 50
times a second; printed are the statuses of the hostile requests, the percentiles of those probes (a slow one also
counts for those that it kept from being sent), and by how much the memory of the server's processes has grown. The
exit code is 1 if a probe failed, its p99 was 100 ms or more, memory grew by over 1 GiB, or a hostile request was
answered with a 500.

With --together all scenarios run at once, each again and again for so many seconds, and one stream all along: printed
are the times between its pieces and those of `/health`, before and meanwhile. The exit code is 1 if the stream's p99
was over twice that of before, `/health`'s 50 ms or more, or anything failed.
"""

import argparse
import os
import sys
import tempfile
import time

from scripts.hostile.scenarios import SCENARIOS, generate
from scripts.hostile.target import Target, own_server
from scripts.hostile.together import settle, together
from scripts.hostile.witness import probe_percentile, witness

LIMIT_MS, LIMIT_MIB = 100.0, 1536  # of memory 1 GiB is one grammar's limit


def measure(name: str, target: Target, limit_ms: float = LIMIT_MS) -> bool:
    """Run one scenario, print its line, and say whether it stayed within the limits."""
    for _ in range(3):
        generate(target)
    before, start = target.rss_mib(), time.perf_counter()
    with witness("probe", target) as found:
        statuses = SCENARIOS[name](target)
        time.sleep(1.0)
    grown = max(found.rss, target.rss_mib()) - before
    p50, p99 = (probe_percentile(found.ms, share) for share in (0.5, 0.99))
    good = not found.failed and p99 < limit_ms and grown < LIMIT_MIB and not statuses[500]
    answers = ", ".join(f"{count} × {status}" for status, count in statuses.items())
    health = f"p50 {p50:7.1f} p99 {p99:8.1f} max {max(found.ms):8.1f} ms"
    line = f"{name:18} {time.perf_counter() - start:5.1f} s  /health {health}, {found.failed} failed, +{grown:5d} MiB"
    sys.stdout.write(f"{line}  {'ok ' if good else 'BAD'} {answers}\n")
    sys.stdout.flush()
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server (default: one of its own)")
    parser.add_argument("--pid", type=int, default=0, help="the running server's process, to measure its memory")
    parser.add_argument("--together", type=float, metavar="SECONDS", help="all at once, beside a stream")
    parser.add_argument("--rounds", type=int, default=1, help="of --together")
    parser.add_argument("--front-workers", type=int, default=1, help="of a server of its own")
    parser.add_argument("scenario", nargs="*", choices=[[], *SCENARIOS], help="default: all")
    arguments = parser.parse_args()
    names = arguments.scenario or list(SCENARIOS)
    good = True
    groups = [names] * arguments.rounds if arguments.together else [[name] for name in names]
    for group in groups:
        if arguments.url:
            host, _, port = arguments.url.rpartition("//")[2].rstrip("/").partition(":")
            good &= _attack(Target(host, int(port or 80), arguments.pid), group, arguments.together)
            continue
        log = os.path.join(tempfile.gettempdir(), "multilora-hostile.log")
        with own_server(log, "--front-workers", str(arguments.front_workers)) as target:
            good &= _attack(target, group, arguments.together)
    return 0 if good else 1


def _attack(target: Target, names: list[str], seconds: float | None) -> bool:
    if seconds is None:
        return measure(names[0], target)
    settle(target)
    return together(target, seconds, names)


if __name__ == "__main__":
    sys.exit(main())
