"""What `deploy/` and the runbook name exists: metrics in /metrics, with the labels asked for, flags, sections.

`test_prometheus.py` asks Prometheus itself.
"""

import json
import re
from pathlib import Path

import msgspec
import pytest
import yaml
from keys import KeyedServer
from prometheus_client.parser import text_string_to_metric_families

from multilora.config import Config
from multilora.engine.messages import AdapterStats
from multilora.options import options_of

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
BOARD = json.loads((ROOT / "deploy/grafana/multilora.json").read_text())
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
RULES = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
QUERIES = {rule["alert"]: rule["expr"] for rule in RULES} | {
    f"{panel['title']} {target['refId']}": target["expr"] for panel in BOARD["panels"] for target in panel["targets"]
}
METRIC = re.compile(r"\b(?:multilora:|vllm:|sglang:|http_|process_)\w+")
OF_PROMETHEUS = {"job", "instance", "le"}
"""Labels that come with every target, and those of buckets."""


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    s = KeyedServer(tmp_path_factory.mktemp("keys"))
    s.load("a")
    for tokens in ([5], [999]):  # the second one is refused
        s.post("/generate", {"input_ids": tokens, "lora_path": "a"}, key="acme")
    nothing = {field.name: 0 for field in msgspec.structs.fields(AdapterStats) if field.type in (int, float)}
    known = AdapterStats(**nothing | {"version": next(iter(s.client.loaded)), "level": "device", "pinned": False})
    s.client.stats = msgspec.structs.replace(s.client.stats, adapters=[known])
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(s.get("/metrics", key="ops").text):
        found.setdefault(family.name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_query_finds_its_metrics_and_labels(samples, query):
    names = METRIC.findall(query)
    assert names or query.startswith("up{")
    assert set(names) <= samples.keys()
    asked = {label for by in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r",\s*", by)}
    asked |= set(re.findall(r"[{,]\s*(\w+)=~?\"", query))
    assert asked - OF_PROMETHEUS <= set().union(*(samples[name] for name in names), ())


def test_the_runbook_names_what_exists(samples):
    assert set(METRIC.findall(RUNBOOK)) <= samples.keys()
    flags = {option.flag for option in options_of(Config)}
    assert set(re.findall(r"--[a-z][a-z-]+", RUNBOOK)) <= flags


def test_each_alert_has_its_section():
    titles = {re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^## (.*)$", RUNBOOK, re.M)}
    for rule in RULES:
        assert rule["annotations"]["runbook"].removeprefix("docs/runbook.md#") in titles
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_board_is_whole():
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert {variable["name"] for variable in BOARD["templating"]["list"]} == {"datasource", "instance"}
