"""What steps and loads of one replica take: fitted to rows that `bench.gpu` has measured on an H200.

Llama-3.1-8B's dimensions in bf16, adapters on all seven projections. A decode step is a plane over batch size,
whether it has adapters, and their bytes; what prompt tokens add is the engine's own regression, `StepCost`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multilora.engine.scheduling.step_cost import StepCost

RESULTS = Path(__file__).parents[1] / "results"
STEPS = "2026-11-28-h200-after-redesign.json"
LOADS = "2026-11-29-h200-cold-streams-redesign.json"
RANK_BYTES = 84e6 / 16
"""Of an adapter, for each of its ranks."""
MIXED_TOKENS = 2048  # of the row "GPU idle, mixed steps": one whole chunk
PROMPT_TOKENS = 128  # of the rows "first token"
DECODES = [  # row, batch size, adapters, sum of their ranks
    ("decode, batch 1, LoRA unused", 1, 0, 0),
    ("decode, batch 64, LoRA unused", 64, 0, 0),
    ("decode, batch 1, 1 distinct rank-16", 1, 1, 16),
    ("decode, batch 8, 8 distinct rank-16", 8, 8, 8 * 16),
    ("decode, batch 32, 32 distinct rank-16", 32, 32, 32 * 16),
    ("decode, batch 64, 64 distinct rank-16", 64, 64, 64 * 16),
    ("decode, batch 64, one rank-16", 64, 1, 16),
    ("decode, batch 64, 64 distinct, ranks 8/16/32/64", 64, 64, 16 * (8 + 16 + 32 + 64)),
]


@dataclass(frozen=True)
class Calibration:
    """Seconds. decode: of a step: fixed, for each row, for having adapters at all, for each rank of distinct ones.
    copy_rate: bytes a second from host memory to the device; fetch_fixed, fetch_rate: from files into host memory,
    one adapter alone; fetch_busy: what comes to that while other requests run; memory_rate: bytes a second of all
    fetches together, from a disk of its own. start: of a replica."""

    decode: tuple[float, float, float, float]
    per_prompt_token: float
    copy_rate: float
    fetch_fixed: float
    fetch_rate: float
    fetch_busy: float
    memory_rate: float
    start: float

    def step(self, decodes: int, prompt_tokens: int, adapters: int, ranks: int) -> float:
        """Seconds of a step with so many decoding rows and prompt tokens, on so many distinct adapters."""
        fixed, row, any_adapter, rank = self.decode
        return (
            fixed
            + row * decodes
            + any_adapter * bool(adapters)
            + rank * ranks
            + self.per_prompt_token * prompt_tokens
        )

    def error(self) -> float:
        """The largest relative error of the fit, over the rows that it was made of."""
        rows = _rows(STEPS)
        errors = [
            abs(self.step(batch, 0, adapters, ranks) / (rows[name]["value"] / 1e3) - 1)
            for name, batch, adapters, ranks in DECODES
        ]
        return max(errors)


def calibrate() -> Calibration:
    """Read the rows and fit."""
    rows, loads = _rows(STEPS), json.loads((RESULTS / LOADS).read_text())
    known = np.array([[1, batch, bool(adapters), ranks] for _, batch, adapters, ranks in DECODES], dtype=float)
    taken = np.array([rows[name]["value"] / 1e3 for name, *_ in DECODES])
    decode, *_ = np.linalg.lstsq(known / taken[:, None], np.ones(len(taken)), rcond=None)  # relative errors
    cost = StepCost()
    colds = [row for run in loads["after"]["cold"] for row in run]
    for _ in range(100):
        cost.observe(MIXED_TOKENS, rows["GPU idle, mixed steps of 64 distinct rank-16"]["step_ms"] / 1e3)
        for row in colds:
            cost.observe(PROMPT_TOKENS, row["warm_ms"] / 1e3)
    fetch = {rank: [row["value"] / 1e3 for row in colds if f"rank {rank}," in row["row"]] for rank in (16, 64)}
    slow, fast = np.mean(fetch[64]), np.mean(fetch[16])
    rate = (64 - 16) * RANK_BYTES / (slow - fast)
    return Calibration(
        decode=tuple(float(value) for value in decode),  # type: ignore[arg-type]
        per_prompt_token=cost.per_token,
        copy_rate=rows["host to device, adapters through the ring"]["value"] * 1e9,
        fetch_fixed=float(fast - 16 * RANK_BYTES / rate),
        fetch_rate=float(rate),
        fetch_busy=_busy(loads["after"]["streams"][0]) - float(fast),
        memory_rate=loads["host_memory_first_use_gb_s"] * 1e9,
        start=json.loads((RESULTS / STEPS).read_text())["seconds"]["start"],
    )


def _busy(row: dict[str, Any]) -> float:
    """Seconds that a cold first token of rank 16 takes more than a warm one beside 32 streams, less half a step,
    which the simulated engine waits for by itself."""
    cold, warm = row["cold"], row["warm"]
    seconds: float = (cold["first_token_ms"] - warm["first_token_ms"] - warm["gap_ms"] / 2) / 1e3
    return seconds


def _rows(name: str) -> dict[str, dict[str, float]]:
    return {row["row"]: row for row in json.loads((RESULTS / name).read_text())["rows"]}
