"""The simulated cluster: what its numbers are made of, and what it is to show, on a small scale."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from bench.cluster_sim.__main__ import compare, main
from bench.cluster_sim.calibration import RANK_BYTES, calibrate
from bench.cluster_sim.engine import Sizes, Tier, bytes_of
from bench.cluster_sim.routing import AdapterAware, RoundRobin
from bench.cluster_sim.simulation import Scenario, Simulation
from bench.cluster_sim.trace import Arrival, Traffic, arrivals, history

SIZES = Sizes(device_bytes=6e9, host_bytes=9e9)
TRAFFIC = Traffic(adapters=120, rate=60, seconds=20, prompt=256, answer=48)
SCENARIO = Scenario(replicas=4, warm=12, sizes=SIZES, history=history(TRAFFIC, 3000))


@pytest.fixture(scope="module")
def calibration():
    return calibrate()


def test_the_fit_is_near_what_was_measured(calibration):
    assert calibration.error() < 0.1
    assert calibration.step(0, 2048, 64, 1024) == pytest.approx(0.056, rel=0.1)
    cold = calibration.fetch_fixed + 16 * RANK_BYTES / calibration.fetch_rate
    assert cold == pytest.approx(0.029, rel=0.1)


def test_traffic_is_what_was_asked_for():
    traffic = Traffic(adapters=100, rate=200, seconds=120, zipf=1.0, drift=0.5, diurnal=0.8, period=120)
    trace = arrivals(traffic)
    assert len(trace) == pytest.approx(200 * 120, rel=0.05)
    first = [one for one in trace if one.time < 60]
    assert len(first) > 2 * (len(trace) - len(first))  # the first half of the period is its day
    assert sum(one.prompt for one in trace) / len(trace) == pytest.approx(512, rel=0.1)
    by_minute = [np.bincount([one.adapter for one in trace if one.time // 60 == i], minlength=100) for i in (0, 1)]
    assert by_minute[0].max() / by_minute[0].sum() == pytest.approx(1 / 5.19, rel=0.2)
    assert (by_minute[0].argsort() != by_minute[1].argsort()).any()
    assert arrivals(traffic) == trace


def test_a_tier_drops_what_was_used_longest_ago_and_keeps_what_is_in_use():
    tier = Tier(3 * bytes_of(0))
    for adapter in (0, 4, 8):
        tier.add(adapter, bytes_of(adapter))
    tier.touch(0)
    assert tier.make_room(bytes_of(0), lambda one: one == 4) == [8]
    assert tier.make_room(3 * bytes_of(0), lambda one: one == 4) is None
    assert list(tier.items) == [4, 0]


def test_adapters_are_found_where_they_were_sent(calibration):
    rows = compare(["adapter-aware", "round robin", "plain hash", "ideal"], TRAFFIC, SCENARIO, calibration, 2)
    aware, ideal = rows["adapter-aware"], rows["ideal"]
    p99 = {name: row["first_token_p99_ms"] for name, row in rows.items()}
    assert p99["adapter-aware"] < 1.2 * p99["ideal"] and p99["adapter-aware"] < 0.6 * p99["round robin"]
    assert aware["fetched_mb_per_request"] < 0.2 * rows["round robin"]["fetched_mb_per_request"]
    assert aware["hit_rate"] > 0.95 > rows["round robin"]["hit_rate"]
    assert ideal["hit_rate"] == 1
    assert len({row["requests"] for row in rows.values()}) == 1
    assert all(row["unfinished"] == 0 for row in rows.values())


@pytest.mark.parametrize("routing", [AdapterAware, RoundRobin])
def test_every_request_has_one_ending_when_replicas_die(calibration, routing):
    scenario = replace(SCENARIO, failures=2, warm=0)
    trace = arrivals(replace(TRAFFIC, rate=30, seconds=12))
    short = replace(calibration, start=2.0)
    measured = Simulation(scenario, short, routing(0), trace).run()
    assert len(measured.seconds) + measured.broken == len(trace)
    assert measured.unfinished == 0 and measured.broken > 0


def test_the_command_writes_json_and_a_plot(tmp_path, monkeypatch, capsys):
    out, plot = tmp_path / "sim.json", tmp_path / "sim.svg"
    arguments = f"--replicas 2 --adapters 20 --seconds 3 --warm 1 --out {out} --plot {plot} --only ideal random"
    monkeypatch.setattr(sys, "argv", ["cluster_sim", *arguments.split()])
    main()
    assert '"largest_error"' in out.read_text() and plot.read_text().startswith("<svg")
    assert capsys.readouterr().out.splitlines()[-1].startswith('{"rows"')


def test_what_came_before_is_asked_for_as_what_comes():
    before = np.bincount(history(TRAFFIC, 20_000), minlength=120)
    now = np.bincount([one.adapter for one in arrivals(replace(TRAFFIC, seconds=200))], minlength=120)
    assert before.argmax() == now.argmax()
    assert before.max() / 20_000 == pytest.approx(1 / 5.37, rel=0.1)


def test_a_tier_remembers_the_latest_of_what_came_before(calibration):
    simulation = Simulation(
        replace(SCENARIO, replicas=1, history=[1, 5, 9]), calibration, RoundRobin(0), arrivals(TRAFFIC)
    )
    simulation._remember()
    [engine] = simulation._engines.values()
    assert list(engine.host.items) == list(engine.device.items) == [1, 5, 9]


def test_cold_first_tokens_beside_streams_are_as_measured(calibration):
    """What `bench.gpu --only streams` has measured: 32 requests decode, 10 a second come on adapters of rank 16."""
    medians = {}
    for ideal in (False, True):
        streams = [Arrival(0.001 * i, 16 * i + 1, 128, 2000) for i in range(32)]
        cold = [Arrival(1 + 0.1 * i + 0.003 * (i % 7), 4 * (i + 1000) + 1, 128, 8) for i in range(80)]
        scenario = Scenario(replicas=1, warm=0.9, ideal=ideal)
        measured = Simulation(scenario, calibration, RoundRobin(0), streams + cold).run()
        medians[ideal] = float(np.median(measured.first))
    assert medians[False] - medians[True] == pytest.approx(0.0472, rel=0.15)
    assert medians[True] == pytest.approx(0.0223, rel=0.5)
