"""Peers' boards and tools find in /metrics what they query: `tests/data/peer_metrics.json` holds their queries.

Each reader's `source` says where its queries were read. `labels` are those that it selects or groups by, `values`
single values that it selects; `absent` names what the peer itself does not always show.

Covers `metrics/vllm.py`, `metrics/sglang.py`, `metrics/family.py` too.
"""

import json
from pathlib import Path

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from prometheus_client.parser import text_string_to_metric_families

READERS = json.loads((Path(__file__).parents[1] / "data" / "peer_metrics.json").read_text())["readers"]
CASES = [(reader["reader"], query) for reader in READERS for query in reader["queries"]]


@pytest.fixture(scope="module")
def families():
    """What /metrics says after a few requests, by the names of samples: their labels, and the type."""
    s = LocalServer(FakeEngineClient(), None)
    s.load("a")
    s.post(
        "/generate", {"input_ids": [[5, 6], [7]], "lora_path": ["a", None], "sampling_params": {"max_new_tokens": 4}}
    )
    s.post("/v1/completions", {"model": "a", "prompt": [5], "max_tokens": 2, "n": 2})
    s.get("/v1/models")
    found = {}
    for family in text_string_to_metric_families(s.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, (family.type, []))[1].append(sample.labels)
    return found


@pytest.mark.parametrize(("reader", "query"), CASES, ids=lambda x: x if isinstance(x, str) else x["metric"])
def test_a_query_has_an_answer(families, reader, query):
    name = query["metric"]
    names = [f"{name}{part}" for part in ("_bucket", "_sum", "_count")] if query["type"] == "histogram" else [name]
    for each in names:
        kind, samples = families[each]
        assert kind == query["type"]
        assert all(set(query["labels"]) <= set(labels) for labels in samples)
    for label, values in query.get("values", {}).items():
        assert set(values) <= {labels[label] for labels in families[names[0]][1]}


def test_the_base_model_is_the_models_name(families):
    names = {labels["model_name"] for _, samples in families.values() for labels in samples if "model_name" in labels}
    assert names == {"base"}


def test_what_a_peer_does_not_always_show_is_not_shown(families):
    assert not [name for reader in READERS for name in reader.get("absent", ()) if name in families]
