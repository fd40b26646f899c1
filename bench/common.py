"""What all benchmarks share: the description of hardware, commit and versions, the hardware's limits measured in the
same run, and the format of a row."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(*packages: str) -> dict[str, Any]:
    """Hardware, commit, versions and the command line."""
    return {
        "commit": os.environ.get("BENCH_COMMIT")
        or _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", *packages)},
    }


def read_bandwidth(device: torch.device, nbytes: int = 1 << 29) -> float:
    """Bytes per second of summing a large array: the highest rate at which weights can be read."""
    data = torch.ones(nbytes // 4, device=device)
    return nbytes / _best_of_5(device, data.sum)


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Floating-point operations per second of a large bf16 product of random matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _best_of_5(device, lambda: a @ b)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _best_of_5(device: torch.device, run: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


LESS_IS_BETTER = ("ms", "us", "ratio")


@dataclass(frozen=True)
class Row:
    """One line of a benchmark, before it is measured."""

    name: str
    unit: str
    target: float | None = None
    best_peer: float | None = None

    def show(self, value: float, limit: float | None = None, **more: Any) -> dict[str, Any]:
        """Print the row beside its limit, target and best peer; returns it for the JSON."""
        less = self.unit in LESS_IS_BETTER
        row: dict[str, Any] = {"row": self.name, "value": round(value, 4), "unit": self.unit}
        text = f"{self.name:<58}{value:9.2f} {self.unit:<9}"
        if limit:
            row["limit"] = round(limit, 4)
            text += f" limit {limit:8.2f} ({limit / value if less else value / limit:4.0%})"
        if self.target is not None:
            row |= {"target": self.target, "met": value <= self.target if less else value >= self.target}
            text += f"  target {self.target:g} {'met' if row['met'] else 'MISSED'}"
        if self.best_peer is not None:
            row["best_peer"] = self.best_peer
            text += f"  best peer {self.best_peer:g}"
        say(text + "".join(f"  {name} {number:.4g}" for name, number in more.items() if isinstance(number, float)))
        return row | {name: _rounded(v) for name, v in more.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def finish(result: dict[str, Any], out: str | None) -> None:
    """Print the result as JSON, on the last line. out: also write it to this file."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else sys.argv[0]


def _git(*args: str) -> str:
    run = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return run.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
