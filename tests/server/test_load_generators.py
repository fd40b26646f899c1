"""What load generators send is served, and what they read is there: `tests/data/load_generators.json`.

An entry is one request as the tool's source (`source`, file and line) makes it, to adapter `a`. Paths into the answer
are dotted: `whole` of an answer that is one object; of a stream, `each`, `some` and `last` of its events, and
`empty_in_last` for a list that ends it by being empty. `object` is the value of that field, which the tool demands.
"""

import json
from pathlib import Path

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer

REQUESTS = json.loads((Path(__file__).parents[1] / "data" / "load_generators.json").read_text())
ABSENT = object()


def at(value, path):
    for part in path.split("."):
        if isinstance(value, list):
            value = value[int(part)] if int(part) < len(value) else ABSENT
        else:
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
    return value


@pytest.fixture(scope="module")
def server():
    tokenizer = byte_level_tokenizer()
    s = LocalServer(FakeEngineClient(vocab_size=320, answer=lambda m: [70, 71, 72, 73]), tokenizer)
    s.load("a")
    return s


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r['tool']} {r['route']}")
def test_a_request_of_a_load_generator(server, request_):
    r = request_
    answer = server.get(r["route"]) if r["method"] == "GET" else server.post(r["route"], r.get("body"))
    assert answer.status == 200, answer.text
    if not r.get("body", {}).get("stream"):
        for path in r.get("whole", ()):
            assert at(answer.json(), path) not in (ABSENT, None), path
        assert r.get("object") in (None, at(answer.json(), "object") if "object" in r else None)
        return
    events = answer.frames
    for path in r.get("each", ()):
        assert all(at(event, path) is not ABSENT for event in events), path
    for path in r.get("some", ()):
        assert [event for event in events if at(event, path) not in (ABSENT, None, "")], path
    for path in r.get("last", ()):
        assert isinstance(at(events[-1], path), int), path
    for path in r.get("empty_in_last", ()):
        assert at(events[-1], path) == [], path
    assert all(event["object"] == r["object"] for event in events if "object" in r)
    assert server.client.submitted[-1].adapters == (
        ((1, 1.0),) if "lora_path" in r["body"] or "model" in r["body"] else ()
    )


def test_each_tool_generates(server):
    tools = {r["tool"].split()[0] for r in REQUESTS if r.get("body", {}).get("stream")}
    assert tools == {"sglang", "vllm", "guidellm", "aiperf"}
