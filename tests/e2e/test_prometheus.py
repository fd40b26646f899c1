"""What is in `deploy/` in the real Prometheus, where there is one on the PATH (Debian: `apt install prometheus`): its
checks, each alert on numbers that it is meant for and on others, and a server that it scrapes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml
from running_server import PATHS, serving

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
BOARD = json.loads((DEPLOY / "grafana/multilora.json").read_text())
RULES = {r["alert"]: r for r in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]}
SECONDS = 120

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None, reason="no Prometheus on the PATH"
)

ONE = 'job="multilora",instance="a"'
MODEL = f'{ONE},engine="0",model_name="m"'


def queue_times(over: str) -> dict[str, str]:
    """Requests that have waited, 6 a minute, of which those `over` 20 s."""
    name = "vllm:request_queue_time_seconds_bucket"
    return {
        f'{name}{{{MODEL},le="1"}}': "0x60" if over == "all" else "0+3x60",
        f'{name}{{{MODEL},le="20"}}': "0x60" if over == "all" else "0+3x60",
        f'{name}{{{MODEL},le="60"}}': "0+3x60",
        f'{name}{{{MODEL},le="+Inf"}}': "0+3x60",
        f"vllm:num_requests_waiting{{{MODEL}}}": "5x60",
    }


def steps(count: str, running: str = "1x60", paused: str = "0x60") -> dict[str, str]:
    return {
        f"multilora:steps_total{{{ONE}}}": count,
        f"vllm:num_requests_running{{{MODEL}}}": running,
        f"vllm:num_requests_waiting{{{MODEL}}}": "0x60",
        f"multilora:paused{{{ONE}}}": paused,
    }


def statuses(errors: str) -> dict[str, str]:
    name = f'http_requests_total{{{ONE},handler="/generate",method="POST"'
    return {f'{name},status="2xx"}}': "0+100x60", f'{name},status="5xx"}}': errors}


def tenants(errors: str) -> dict[str, str]:
    return {
        f'multilora:tenant_request_errors_total{{{ONE},tenant="acme",error="RateLimited"}}': errors,
        f'multilora:tenant_requests_started_total{{{ONE},tenant="acme"}}': "0+100x60",
    }


# alert → series by which it fires, and others by which it does not; a value each 30 s, looked at after 25 minutes
CASES: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    "MultiloraDown": ([{f"up{{{ONE}}}": "0x60"}], [{f"up{{{ONE}}}": "1x60"}, {'up{job="node"}': "0x60"}]),
    "MultiloraEngineRestarts": (
        [{f"multilora:engine_restarts_total{{{ONE}}}": "0x30 1x10 2x20"}],
        [{f"multilora:engine_restarts_total{{{ONE}}}": values} for values in ("0x40 1x20", "1x30 2x20", "0x60")],
    ),
    "MultiloraStepsStopped": (
        [steps("7x60")],
        [steps("0+9x60"), steps("7x60", "0x60"), steps("7x60", paused="1x60")],
    ),
    "MultiloraServerErrors": ([statuses("0+10x60")], [statuses("0+2x60"), statuses("0x60")]),
    "MultiloraQueueing": ([queue_times("all")], [queue_times("none")]),
    "MultiloraPreemptions": (
        [{f"multilora:preemptions_total{{{ONE}}}": "0+30x60"}],
        [{f"multilora:preemptions_total{{{ONE}}}": "0+3x60"}],
    ),
    "MultiloraAdaptersThrash": (
        [{f'multilora:adapter_evictions_total{{{ONE},adapter_name="{n}"}}': "0+20x60" for n in "xy"}],
        [{f'multilora:adapter_evictions_total{{{ONE},adapter_name="{n}"}}': "0+2x60" for n in "xy"}],
    ),
    "MultiloraTenantErrors": ([tenants("0+50x60")], [tenants("0+10x60")]),
    "MultiloraDescriptors": (
        [{f"process_open_fds{{{ONE}}}": "90x60", f"process_max_fds{{{ONE}}}": "100x60"}],
        [{f"process_open_fds{{{ONE}}}": "9x60", f"process_max_fds{{{ONE}}}": "100x60"}],
    ),
}


def promtool(*arguments: object) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_rules_and_the_configuration():
    promtool("check", "rules", PROMETHEUS / "alerts.yml")
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_every_alert_has_its_cases():
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_when_it_should_and_else_not(alert, tmp_path):
    tests = [
        {
            "interval": "30s",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f"count({RULES[alert]['expr']})",
                    "eval_time": "25m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
            ],
        }
        for fires, cases in zip((True, False), CASES[alert], strict=True)
        for series in cases
    ]
    rules = [str(PROMETHEUS / "alerts.yml")]
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": rules, "evaluation_interval": "30s", "tests": tests}))
    promtool("test", "rules", file)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory, "--lora-paths", f"pirate={PATHS['pirate']}") as server:
        server.answer("pirate")
        yield server


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    """A client of one that scrapes the server, by the configuration in `deploy/` but for addresses and times."""
    path = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    (path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={path}/prometheus.yml", f"--storage.tsdb.path={path}/data"]
    with (path / "log").open("wb") as log:
        command.append(f"--web.listen-address={address}")
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"GOMAXPROCS": "1"})
    client = httpx.Client(base_url=f"http://{address}/api/v1", timeout=SECONDS)
    try:
        until(lambda: ask(client, "/query", query='count_over_time(up{job="multilora"}[1m]) > 3')["result"], path)
        yield client
    finally:
        client.close()
        process.send_signal(signal.SIGTERM)
        process.wait(SECONDS)


def until(condition, path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:  # it is not up yet
            pass
        assert time.monotonic() < deadline, (path / "log").read_text()
        time.sleep(0.2)


def ask(client: httpx.Client, path: str, **query: str):
    answer = client.get(path, params=query)
    if answer.status_code == 503:  # still starting
        return {"result": []}
    body = answer.json()
    assert body["status"] == "success", f"{query}: {body}"
    return body["data"]


@pytest.mark.slow
def test_the_server_is_scraped_and_the_rules_are_loaded(prometheus):
    (target,) = ask(prometheus, "/targets")["activeTargets"]
    assert (target["health"], target["lastError"], target["labels"]["job"]) == ("up", "", "multilora")
    (group,) = ask(prometheus, "/rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == RULES.keys()
    assert {(rule["health"], rule["state"], rule.get("lastError", "")) for rule in group["rules"]} == {
        ("ok", "inactive", "")
    }


EMPTY = {"Tenants' tokens per second", "Tenants' first token", "Tenants' errors"}
"""Beginnings of what the board shows only where there are keys."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "query"),
    [(panel["title"], target["expr"]) for panel in BOARD["panels"] for target in panel["targets"]],
    ids=[f"{panel['title']} {target['refId']}" for panel in BOARD["panels"] for target in panel["targets"]],
)
def test_the_boards_queries_are_answered(prometheus, title, query):
    asked = query.replace("$__rate_interval", "1m").replace("$instance", ".*")
    assert "$" not in asked
    found = ask(prometheus, "/query", query=asked)["result"]
    assert bool(found) != title.startswith(tuple(EMPTY))


@pytest.mark.slow
def test_the_boards_instances_are_found(prometheus, server):
    (variable,) = (v for v in BOARD["templating"]["list"] if v["name"] == "instance")
    assert variable["query"]["query"] == "label_values(multilora:pages, instance)"
    found = ask(prometheus, "/label/instance/values", **{"match[]": "multilora:pages"})
    assert found == [server.url.removeprefix("http://")]
