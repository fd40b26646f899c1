"""`bench.cluster` and the simulator's tables and validation, as far as they go without Ray."""

import argparse
import asyncio
import json
import sys

import httpx
import pytest

from bench import cluster, cluster_client
from bench.cluster_client import GENERATED, Cluster
from bench.cluster_sim import machine, report, tables, validate
from bench.cluster_sim.calibration import calibrate
from bench.cluster_sim.machine import Machine

METRICS = "".join(
    f'# TYPE n counter\n{GENERATED}{{replica="{name}",model="m"}} {{count}}\nother{{{{replica="{name}"}}}} 7\n'
    for name in "ab"
)
ARGS = argparse.Namespace(
    device="cpu", tp_size=1, device_bytes="1GB", host_bytes="1GB", port=1, ingresses=1, dims="tiny"
)


@pytest.fixture
def replicas(monkeypatch):
    """A cluster that generates ten tokens between two questions, and answers at once."""
    counts, asked = iter(range(0, 1000, 10)), []

    async def answer(request):
        await asyncio.sleep(0.002)
        asked.append(json.loads(request.content))
        return httpx.Response(200, json={"text": "x"})

    def get(url, timeout):
        del url, timeout
        return httpx.Response(200, text=METRICS.replace("{count}", str(next(counts))).replace("{{", "{"))

    monkeypatch.setattr(cluster_client.httpx, "get", get)
    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(cluster, "client_of", lambda c: httpx.AsyncClient(base_url=c.url, transport=transport))
    return asked


def test_what_replicas_generate_is_counted_while_clients_keep_them_busy(replicas, tmp_path):
    made = Cluster(cluster.contents(ARGS, tmp_path), 1.0)
    assert made.samples(GENERATED) == {"a": 0.0, "b": 0.0}
    found = asyncio.run(cluster.keep_busy(made, cluster.WORK["cpu"], 3, 0.05, 0.2))
    assert 0 < found["tokens_s"] <= 20 / 0.2 and set(found["by_replica"]) == {"a", "b"}
    assert found["requests"] > 3 and found["client_tokens_s"] > 0
    assert [one["lora_path"] for one in replicas[:4]] == [f"adapter-{i}" for i in range(4)]
    assert {one["sampling_params"]["max_new_tokens"] for one in replicas} == {cluster.WORK["cpu"].answer}


def test_an_error_of_a_request_ends_the_measurement(replicas, tmp_path, monkeypatch):
    del replicas
    transport = httpx.MockTransport(lambda _: httpx.Response(503, text="down"))
    monkeypatch.setattr(cluster, "client_of", lambda c: httpx.AsyncClient(base_url=c.url, transport=transport))
    made = Cluster(cluster.contents(ARGS, tmp_path), 1.0)
    with pytest.raises(RuntimeError, match="503 down"):
        asyncio.run(cluster.keep_busy(made, cluster.WORK["cpu"], 3, 0.05, 0.2))


def test_adapters_of_a_cpu_are_the_bundled_ones_under_many_names(tmp_path):
    found = cluster.adapters(ARGS, tmp_path)
    assert len(found) == cluster.ADAPTERS and all(path.is_dir() for path in found.values())


def test_every_experiment_has_cases_and_a_table_is_written_and_shown(tmp_path, monkeypatch, capsys):
    assert all(len(list(one(33.0))) > 1 for one in tables.EXPERIMENTS.values())
    small = tables.Case(replicas=2, adapters=10, history=5, warm=0.5, seconds=2.0)
    cases = [
        tables.replace(small, routing=name, load=load) for load in (0.5, 0.6) for name in ("adapter-aware", "ideal")
    ]
    monkeypatch.setattr(tables, "EXPERIMENTS", {"headline": lambda _: cases[:2], "loads": lambda _: cases[2:]})
    out = tmp_path / "out.json"
    tables.run(["headline"], out)
    tables.run(["loads"], out)
    bars, lines = tmp_path / "bars.svg", tmp_path / "lines.svg"
    monkeypatch.setattr(sys, "argv", ["report", str(out), "--bars", str(bars), "--lines", str(lines)])
    report.main()
    shown = capsys.readouterr().out
    assert shown.count("| **adapter-aware** |") == 2 and "### loads" in shown
    assert bars.read_text().startswith("<svg") and lines.read_text().count("<polyline") == 2
    rows = json.loads(out.read_text())["tables"]["headline"]
    assert report.cheapest(rows, 1e9) == {"adapter-aware": 2, "ideal": 2}
    assert report.cheapest(rows, 0) == {"adapter-aware": None, "ideal": None}
    hours = 2 / (rows[0]["rate"] * 128 * 3600 / 1e6)
    assert list(report.costs(rows, 1e9))[-1] == f"| ideal | 2 | {hours:.4f} | 1.00 |"
    assert list(report.costs(rows, 0))[-1] == f"| ideal | more than 2 | more than {hours:.4f} |  |"


def known(**changes):
    calibration = tables.replace(calibrate(), decode=(0.01, 0.001, 0.0, 0.0), per_prompt_token=1e-4)
    return tables.replace(Machine(calibration, [1.0, 1.0, 1.0], ([0.05], [0.05])), **changes)


def test_the_simulated_half_of_the_validation():
    traffic, trace = validate.trace_of(3.0, 8.0)
    assert max(one.prompt for one in trace) <= validate.LONGEST
    found = validate.simulated(traffic, trace, known())
    assert 60 < found["first_token_p50_ms"] < 100 and found["request_p50_ms"] > found["first_token_p50_ms"]
    shared = validate.simulated(traffic, trace, known(shared=[1.0, 3.0, 3.0], beside=([0.05], [0.09])))
    assert shared["request_mean_ms"] > 1.1 * found["request_mean_ms"]
    assert validate.rate_of(known(), 0.5) == pytest.approx(0.5 * 3 * 16 / (24 * 0.026 + 16 * 48e-4), rel=0.01)


class Real:
    """Three replicas, of which a step takes `STEP` seconds, three times as many while two or more compute."""

    STEP, BESIDE, PROMPT = 0.02, 0.03, 1e-4
    url = ""

    def __init__(self):
        self.counts = dict.fromkeys("abc", 0.0)
        self.busy = set()

    def samples(self, metric):
        assert metric == GENERATED
        return dict(self.counts)

    async def generate(self, client, prompt, adapter, tokens, *, stream, session):
        del client, adapter
        assert stream
        name = "abc"[int(session.split("-")[1]) % 3]
        self.busy.add(name)
        await asyncio.sleep(0)  # all that come together have come
        step = self.STEP * (1 if len(self.busy) == 1 else 3)
        first = self.BESIDE + step + self.PROMPT * len(prompt)
        await asyncio.sleep(0.002 * tokens)
        self.busy.discard(name)
        self.counts[name] += tokens
        return cluster_client.Timed(0.0, first, first + step * (tokens - 1), tokens)


def test_what_the_machine_takes_is_measured_by_replica(monkeypatch):
    real = Real()
    monkeypatch.setattr(machine, "generate", real.generate)
    monkeypatch.setattr(machine, "METRIC_SECONDS", 0.0)
    monkeypatch.setattr(machine, "TOKENS", 40)
    found = asyncio.run(machine.measure(real, 3, 24, 160))
    assert found.step(1, 1) == pytest.approx(0.02) and found.step(6, 2) == pytest.approx(0.06)
    assert found.shared == pytest.approx([1.0, 3.0, 3.0])
    assert found.calibration.per_prompt_token == pytest.approx(1e-4)
    assert found.beside[0] == pytest.approx([0.03] * machine.PROBES)
    assert found.row()["step_ms"]["fixed"] == pytest.approx(20.0)
    assert found.mean_with(known()).step(1, 1) == pytest.approx((0.02 + 0.011) / 2)
