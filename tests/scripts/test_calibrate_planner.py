"""The planner against every decode and throughput row that was measured on the H200; docs/planner.md states the same.

The rows beyond 10 %: on one machine copies from host memory went at half the speed of the others (two rows of
`others`), the first run of the thousand adapters was disturbed (its passes differ by a quarter, and five later runs
are within 2 %), and decode of 8 rows is cheaper in the model than in any run (6 to 11 %).
"""

import statistics

import numpy as np
import pytest

from multilora.planner.step_model import CALIBRATED
from scripts.calibrate_planner import (
    FITTED,
    HELD_OUT,
    SHARED_AND_EXPERTS,
    errors,
    fit,
    measured,
    not_negative_least_squares,
    predicted,
)

BEYOND = {
    ("2026-11-22-h200-all-rows", "throughput, 1000 requests, as many rank-8 adapters, twice"): 0.18,
    ("2026-11-22-h200-others", "throughput, 64 distinct rank-16, --lora-device-bytes of 8"): 0.30,
    ("2026-11-22-h200-others", "throughput, 250 requests, as many rank-8 adapters, twice"): 0.16,
    ("2026-11-22-h200-decode-throughput", "decode, batch 8, 8 distinct rank-16"): 0.12,
}


def test_decode_rows():
    rows = [row for row in measured(FITTED + HELD_OUT) if row.unit == "ms"]
    assert len(rows) > 50
    for row in rows:
        limit = BEYOND.get((row.file, row.name), 0.10)
        assert predicted(row) == pytest.approx(row.value, rel=limit), row


def test_experts_and_two_gpus():
    """Two runs of the same rows on two GPUs differ by up to 30 %, so that nothing could be within 10 % of both."""
    found = [(row, abs(error)) for row, _, error in errors(SHARED_AND_EXPERTS) if row.unit == "ms"]
    assert len(found) == 20
    assert statistics.median(error for _, error in found) < 0.06
    assert max(error for _, error in found) < 0.24
    assert all(error < 0.10 for row, error in found if "experts" in row.file)


@pytest.mark.slow
def test_every_row():
    found = list(errors(FITTED + HELD_OUT))
    assert len(found) > 90
    beyond = {(row.file, row.name): abs(error) for row, _, error in found if abs(error) > 0.10}
    assert beyond.keys() == BEYOND.keys()
    assert all(error <= BEYOND[key] for key, error in beyond.items())
    assert statistics.median(abs(error) for *_, error in found) < 0.04


@pytest.mark.slow
def test_the_coefficients_are_what_the_script_fits():
    assert vars(fit(measured(FITTED))) == pytest.approx(vars(CALIBRATED), rel=1e-3)


def test_least_squares():
    table = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert not_negative_least_squares(table, table @ [0.5, 3.0]) == pytest.approx([0.5, 3.0])
    assert not_negative_least_squares(table, table @ [2.0, -1.0])[1] == 0
