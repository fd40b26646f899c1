"""Fits the planner's step-cost model to the rows that `bench/gpu` measured on the H200, and says how far off it is.

    python -m scripts.calibrate_planner           the error of every measured row, as the planner is now
    python -m scripts.calibrate_planner --fit     the coefficients, for `CALIBRATED` in planner/step_model.py

Each row's workload is run through the planner's simulation, which says what steps it consists of; its time is linear
in the coefficients. They are fitted by least squares of the relative error, none below 0, to the rows of `FITTED`
alone, without the one where adapters take turns; that and the other files are held out. The rows of other models and
of two GPUs are listed by themselves: nothing is fitted to them but the time of routing to experts, to one of theirs.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bench.gpu.sizes import SIZES, write_model
from multilora.planner.facts import ModelFacts, model_facts
from multilora.planner.gpus import GPUS
from multilora.planner.simulation import Adapters, Arrival, SimulatedLimits, Simulation
from multilora.planner.step_model import CALIBRATED, TERMS, StepCoefficients, StepLoad, StepModel

RESULTS = Path(__file__).parents[1] / "bench" / "results"
FITTED = ("2026-11-22-h200-all-rows", "2026-11-26-h200-all-rows")
HELD_OUT = (
    "2026-11-22-h200-decode-throughput",
    "2026-11-22-h200-throughput-cold",
    "2026-11-22-h200-others",
    "2026-11-26-h200-latency",
    "2026-11-28-h200-before-redesign",
    "2026-11-28-h200-after-redesign",
    "2026-11-29-h200-many-before",
    "2026-11-29-h200-many-after",
)
SHARED_AND_EXPERTS = {
    "2026-11-29-h200-x2-tp": ("llama-8b", 2),
    "2026-11-29-h200-x2-tp-again": ("llama-8b", 2),
    "2026-11-29-h200-x2-70b": ("llama-70b", 2),
    "2026-11-29-h200-experts": ("qwen3-30b-a3b", 1),
}
"""Other dimensions and numbers of GPUs, by file."""
H200 = GPUS["h200"]
MIXED = (8, 16, 32, 64)
DIMS, WORK = SIZES["llama-8b"]


@dataclass(frozen=True)
class MeasuredRow:
    """One row. unit: ms of a decode step, or tokens/s."""

    file: str
    name: str
    value: float
    unit: str

    @property
    def facts(self) -> ModelFacts:
        return llama(*SHARED_AND_EXPERTS.get(self.file, ("llama-8b", 1)))


@cache
def llama(dims: str = "llama-8b", tp_size: int = 1) -> ModelFacts:
    """The model that a row was measured with, as the benchmark writes it: Llama-3.1-8B's dimensions but for a few."""
    with tempfile.TemporaryDirectory() as folder:
        return model_facts(write_model(Path(folder) / "model", SIZES[dims][0]), tp_size=tp_size)


def measured(files: Iterable[str]) -> list[MeasuredRow]:
    """The decode and throughput rows of these files; of a row that is a ratio, the milliseconds beside it."""
    return [
        MeasuredRow(file, row["row"], row.get("ms", row["value"]), "ms" if "ms" in row else row["unit"])
        for file in files
        for row in json.loads((RESULTS / f"{file}.json").read_text())["rows"]
        if (row["unit"] in ("ms", "tokens/s") or "ms" in row) and re.match(r"decode|throughput", row["row"])
    ]


@cache
def steps_of(
    name: str, facts: ModelFacts, coefficients: StepCoefficients = CALIBRATED
) -> tuple[tuple[StepLoad, ...], int, float]:
    """The steps of a row, how many tokens or steps they stand for, and seconds without a step (waits for copies)."""
    if decode := re.match(r"decode, batch (\d+), (.*)", name):
        batch, what = int(decode[1]), decode[2]
        context = batch * (WORK.decode_prompt + WORK.decode_steps // 2)
        if "LoRA unused" in what:
            return (StepLoad(batch, 0, context),), 1, 0.0
        ranks = [16] if what == "one rank-16" else (list(MIXED) * batch if "ranks" in what else [16] * batch)[:batch]
        distinct = int(number[1]) if (number := re.match(r"(\d+) distinct", what)) else len(ranks)
        nbytes = sum(map(facts.adapter_bytes, ranks[:distinct]))
        return (StepLoad(batch, 0, context, adapted_tokens=batch, adapter_bytes=nbytes),), 1, 0.0
    simulation = _throughput(name, facts, coefficients)
    found = simulation.result
    return tuple(found.steps), found.tokens, found.seconds - seconds_of(tuple(found.steps), facts, coefficients)


def seconds_of(steps: tuple[StepLoad, ...], facts: ModelFacts, coefficients: StepCoefficients) -> float:
    """Seconds of all of them."""
    model = StepModel(facts, H200, coefficients)
    return sum(map(model.seconds, steps))


def _throughput(name: str, facts: ModelFacts, coefficients: StepCoefficients) -> Simulation:
    many = re.search(r"(\d+) requests, as many rank-8", name)
    ranks = (8,) if many else MIXED if "ranks" in name else (16,)
    adapters = Adapters(
        ranks,
        facts.adapter_bytes,
        facts.adapter_pages,
        lambda rank: facts.adapter_pages(rank) * facts.layout.page_bytes / H200.link,
    )
    requests = int(many[1]) * 2 if many else WORK.requests
    distinct = requests // 2 if many else 0 if "unused" in name else 1 if "one rank" in name else WORK.adapters
    arrivals = [Arrival(0.0, WORK.prompt, WORK.answer, i % distinct if distinct else None) for i in range(requests)]
    room = WORK.many_device_bytes // facts.layout.page_bytes if many else None
    if "device-bytes" in name:
        room = WORK.slots * facts.adapter_pages(16)
    limits = SimulatedLimits(WORK.batch, 2048, 50_000, facts.layout.pages_for, room)
    simulation = Simulation(StepModel(facts, H200, coefficients).seconds, adapters, limits, keep=True)
    simulation.run(arrivals)
    return simulation


def predicted(row: MeasuredRow, coefficients: StepCoefficients = CALIBRATED) -> float:
    """What the planner says, in the row's unit."""
    steps, count, waits = steps_of(row.name, row.facts, coefficients)
    seconds = waits + seconds_of(steps, row.facts, coefficients)
    return seconds / count * 1e3 if row.unit == "ms" else count / seconds


def fit(rows: list[MeasuredRow]) -> StepCoefficients:
    """The coefficients, by least squares of the relative error."""
    rows = [row for row in rows if "device-bytes" not in row.name]
    model = StepModel(llama(), H200)
    table, rest = [], []
    for row in rows:
        steps, count, waits = steps_of(row.name, row.facts)
        seconds = row.value / 1e3 * count if row.unit == "ms" else count / row.value
        table.append(np.array([model.terms(load) for load in steps]).sum(axis=0) / seconds)
        rest.append(1 - (waits + sum(map(model.fixed, steps))) / seconds)
    found = not_negative_least_squares(np.array(table), np.array(rest))
    return StepCoefficients(**{name: float(f"{value:.4g}") for name, value in zip(TERMS, found, strict=True)})


def not_negative_least_squares(table: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The x of no negative number for which table · x is nearest to rest, by coordinate descent."""
    scale = np.abs(table).max(axis=0)
    table = table / scale
    products, aims = table.T @ table, table.T @ rest
    found = np.zeros(table.shape[1])
    for _ in range(100_000):
        before = found.copy()
        for i in range(len(found)):
            found[i] = max(0.0, found[i] + (aims[i] - products[i] @ found) / products[i, i])
        if np.abs(found - before).max() < 1e-10:
            break
    return found / scale


def errors(files: Iterable[str]) -> Iterator[tuple[MeasuredRow, float, float]]:
    """(row, prediction, relative error) of every row."""
    for row in measured(files):
        said = predicted(row)
        yield row, said, said / row.value - 1


def main() -> int:
    """Print errors, or coefficients. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="print coefficients instead")
    if parser.parse_args().fit:
        sys.stdout.write(f"{fit(measured(FITTED))}\n")
        return 0
    sets = (("fitted", FITTED), ("held out", HELD_OUT), ("experts, or two GPUs", SHARED_AND_EXPERTS))
    for label, files in sets:
        found = list(errors(files))
        for row, said, error in found:
            sys.stdout.write(f"{row.file:36} {row.name:58} {row.value:9.2f} {said:9.2f} {row.unit:9}{error:+7.1%}\n")
        sizes = [abs(error) for *_, error in found]
        sys.stdout.write(
            f"{label}: {len(sizes)} rows, median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%}\n\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
