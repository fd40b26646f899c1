"""All scenarios at once, again and again, while one stream runs: what that does to the stream and to `/health`."""

import os
import sys
import time
from dataclasses import dataclass

from scripts.hostile.attackers import attackers
from scripts.hostile.scenarios import SCENARIOS
from scripts.hostile.target import Target
from scripts.hostile.witness import Found, percentile, probe_percentile, witness

HEALTH_MS, GAP_RATIO = 50.0, 2.0
SETTLE_SECONDS = 2.0


@dataclass
class Phase:
    """What was noticed in so many seconds."""

    gaps: Found
    health: Found
    load: float

    def line(self, name: str) -> str:
        gaps, health = self.gaps.ms, self.health.ms
        times = [percentile(gaps, 0.5), percentile(gaps, 0.99), max(gaps)]
        probes = [probe_percentile(health, 0.5), probe_percentile(health, 0.99)]
        return (
            f"{name:9} gaps p50 {times[0]:6.1f} p99 {times[1]:7.1f} max {times[2]:8.1f} ms of {len(gaps)}, "
            f"{self.gaps.failed} streams failed; /health p50 {probes[0]:6.1f} p99 {probes[1]:7.1f} ms, "
            f"{self.health.failed} failed; load {self.load:.1f}"
        )


def together(target: Target, seconds: float, names: list[str]) -> bool:
    """Print a line of a quiet phase and one of an attacked phase, and say whether the second is within the limits."""
    quiet = _phase(target, seconds)
    _say(quiet.line("quiet"))
    with attackers(target, seconds, names) as statuses:
        attacked = _phase(target, seconds)
    _say(attacked.line("attacked"))
    ratio = percentile(attacked.gaps.ms, 0.99) / percentile(quiet.gaps.ms, 0.99)
    health = probe_percentile(attacked.health.ms, 0.99)
    faults = sum(count for status, count in statuses.items() if status.endswith(" 500"))
    good = not attacked.health.failed and not attacked.gaps.failed and not faults
    good &= ratio <= GAP_RATIO and health < HEALTH_MS
    found = f"gap p99 × {ratio:.2f} (at most {GAP_RATIO:g}), /health p99 {health:.1f} ms (under {HEALTH_MS:g})"
    _say(f"{'ok ' if good else 'BAD'} {found}")
    _say("    " + ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items())))
    return good


def _phase(target: Target, seconds: float) -> Phase:
    with witness("probe", target) as health, witness("stream", target) as gaps:
        time.sleep(seconds)
    return Phase(gaps, health, os.getloadavg()[0])


def settle(target: Target) -> None:
    """Have it compile and allocate what a first request makes it."""
    for _ in range(3):
        SCENARIOS["wrong-values"](target)
    time.sleep(SETTLE_SECONDS)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
