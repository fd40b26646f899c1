"""What the programs of load generators share: running the tool, and what the server counted meanwhile."""

import re
import subprocess
import urllib.request
from typing import NamedTuple

from checks import URL, same

SERIES = re.compile(r'multilora:(\w+)_total{adapter_name="([^"]*)"(?:,finish_reason="(\w+)")?} (\S+)')
SECONDS = 400  # of one run


class Served(NamedTuple):
    """What the server served of one model: requests that ended as asked, their prompts' tokens, tokens generated."""

    requests: int
    prompt: int
    generated: int


def counted() -> dict[str, Served]:
    """What the server has served of each model since it started, by its /metrics."""
    with urllib.request.urlopen(f"{URL}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    counts: dict[tuple[str, str], int] = {}
    for name, model, ending, value in (found.groups() for line in lines if (found := SERIES.match(line))):
        if ending in (None, "stop", "length"):
            counts[model, name] = counts.get((model, name), 0) + int(float(value))
    kinds = ("requests", "prompt_tokens", "generation_tokens")
    return {model: Served(*(counts.get((model, kind), 0) for kind in kinds)) for model, _ in counts}


def served(before: dict[str, Served]) -> dict[str, Served]:
    """What the server has served since `before`, of each model that was asked anything."""
    zero = Served(0, 0, 0)
    new = {
        model: Served(*(a - b for a, b in zip(now, before.get(model, zero), strict=True)))
        for model, now in counted().items()
    }
    return {model: count for model, count in new.items() if count != zero}


def run(*command: object) -> str:
    """What the tool printed; it has to end with exit code 0."""
    done = subprocess.run(
        [str(part) for part in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS
    )
    print(done.stdout, flush=True)
    same(done.returncode, 0)
    return done.stdout
