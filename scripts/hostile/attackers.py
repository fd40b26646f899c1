"""Scenarios at once, from a process of their own: `python -m scripts.hostile.attackers HOST PORT PID SECONDS NAME …`.

Each begins again until the time is over; how many requests ended how is printed then. It takes what cores others
leave, as attackers would be on other machines: its niceness alone would not do, since Linux shares out cores among
sessions first (autogroup).
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scripts.hostile.scenarios import SCENARIOS
from scripts.hostile.target import Target

NICE = 19
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def attackers(target: Target, seconds: float, names: list[str]) -> Iterator[Counter[str]]:
    """Filled when this ends, which waits for them."""
    where = [target.host, str(target.port), str(target.pid), str(seconds)]
    command = [sys.executable, "-m", "scripts.hostile.attackers", *where, *names]
    statuses: Counter[str] = Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # they have begun
        yield statuses
        said, _ = process.communicate()
    statuses.update(json.loads(said))


def _attack(target: Target, name: str, end: float, statuses: Counter[str]) -> None:
    while time.monotonic() < end:
        for status, count in SCENARIOS[name](target).items():
            said = str(status).split(" after")[0]
            statuses[f"{name} {said}"] += count


def main(host: str, port: str, pid: str, seconds: str, *names: str) -> int:
    """Attack, and print what was answered."""
    os.nice(NICE)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w", encoding="ascii") as file:
        file.write(str(NICE))
    target = Target(host, int(port), int(pid))
    end = time.monotonic() + float(seconds)
    found = [Counter[str]() for _ in names]
    threads = [
        threading.Thread(target=_attack, args=(target, name, end, one))
        for name, one in zip(names, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps(sum(found, Counter[str]())))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
