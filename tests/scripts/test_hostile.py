"""The hostile requests against real servers: nobody else waits, memory stays, nothing is a 500."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import hostile


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile.SCENARIOS)
def test_a_hostile_scenario_disturbs_nobody(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "LIMIT_MS", 1000.0)  # beside other tests; alone on a machine: 100
    with hostile.own_server(str(tmp_path / "log")) as target:
        assert hostile.measure(name, target)
