"""The hostile requests against real servers: nobody else waits, memory stays, nothing is a 500."""

import pytest

from scripts.hostile.__main__ import measure
from scripts.hostile.scenarios import SCENARIOS
from scripts.hostile.target import own_server
from scripts.hostile.together import settle, together
from scripts.hostile.witness import percentile, probe_percentile

LIMIT_MS = 1000.0  # beside other tests; alone on a machine: 100


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_hostile_scenario_disturbs_nobody(name, tmp_path):
    with own_server(str(tmp_path / "log")) as target:
        assert measure(name, target, LIMIT_MS)


@pytest.mark.slow
def test_all_of_them_at_once_end_no_stream(tmp_path, monkeypatch):
    """How long they delay it depends on what else the machine does: figures are in docs/security.md."""
    monkeypatch.setattr("scripts.hostile.together.HEALTH_MS", 5000.0)
    monkeypatch.setattr("scripts.hostile.together.GAP_RATIO", 100.0)
    with own_server(str(tmp_path / "log")) as target:
        settle(target)
        assert together(target, 20, list(SCENARIOS))


def test_percentiles_of_probes_count_those_that_a_slow_one_kept_from_being_sent():
    assert percentile([3, 1, 2], 0.5) == 2 and percentile([1, 2], 0.99) == 2
    assert probe_percentile([1] * 50 + [1000], 0.6) == 200  # 1000, 980, … 0 stand for 51
