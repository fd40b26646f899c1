"""Traces of a real server, front → engine → loader, as a collector on loopback sees them."""

import json
import shutil

import pytest
from otlp import Collector, path_of
from running_server import GREEDY, PATHS, PROMPT, serving

pytestmark = pytest.mark.slow

PARENT = "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def collector():
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def server(collector, tmp_path_factory):
    found = tmp_path_factory.mktemp("adapters")
    shutil.copytree(PATHS["pirate"], found / "pirate")
    flags = ("--enable-lora", "--lora-resolver-dir", str(found), "--otlp-traces-endpoint", collector.url)
    with serving(tmp_path_factory, *flags) as server:
        yield server


def traced(number):
    """A trace id, and the header of a client that records it."""
    trace_id = f"{number:032x}"
    return trace_id, {"traceparent": f"00-{trace_id}-{PARENT}-01"}


def body(**fields):
    return {"text": PROMPT, "sampling_params": GREEDY} | fields


def test_a_request(server, collector):
    trace_id, headers = traced(0xA)
    answer = server.http.post("/generate", json=body(), headers=headers).json()
    names = ("POST /generate", "llm_request", "engine", "queue", "prefill", "decode")
    spans = collector.trace(trace_id, *names)
    assert set(spans) == set(names)
    assert spans["POST /generate"].parent_id == PARENT
    for phase in names[3:]:
        assert path_of(spans, phase) == ["POST /generate", "llm_request", "engine", phase]
    assert [spans[name].process for name in names[:3]] == ["front", "front", "engine"]
    assert spans["POST /generate"].attributes["http.response.status_code"] == 200
    says = spans["llm_request"].attributes
    assert says["gen_ai.usage.completion_tokens"] == answer["meta_info"]["completion_tokens"]
    assert says["gen_ai.usage.prompt_tokens"] == answer["meta_info"]["prompt_tokens"]
    assert says["gen_ai.request.max_tokens"] == 64
    assert "multilora.adapter.name" not in says
    assert 0 < says["gen_ai.latency.time_to_first_token"] <= says["gen_ai.latency.e2e"]
    assert spans["engine"].attributes["gen_ai.latency.time_in_model_decode"] > 0
    # queue ── prefill ── decode, one after the other, within the engine's part
    assert spans["engine"].start == spans["queue"].start <= spans["queue"].end == spans["prefill"].start
    assert spans["prefill"].end == spans["decode"].start <= spans["decode"].end == spans["engine"].end
    assert {span.service for span in spans.values()} == {"multilora"}


def test_a_request_that_loads_an_adapter(server, collector):
    trace_id, headers = traced(0xB)
    assert server.http.post("/generate", json=body(lora_path="pirate"), headers=headers).status_code == 200
    spans = collector.trace(
        trace_id, "POST /generate", "decode", "loader.fetch", "engine.load_adapter", "load_adapter"
    )
    path = ["POST /generate", "load_adapter", "engine.load_adapter", "loader.fetch"]
    assert path_of(spans, "loader.fetch") == path
    assert [spans[name].process for name in path] == ["front", "front", "engine", "loader"]
    assert spans["llm_request"].attributes["multilora.adapter.name"] == "pirate"
    version = int(spans["llm_request"].attributes["multilora.adapter.version"])
    assert {spans[name].attributes["multilora.adapter.version"] for name in path[1:]} == {version}
    assert spans["loader.fetch"].attributes["multilora.adapter.rank"] == 4


def test_a_request_that_is_aborted(server, collector):
    trace_id, headers = traced(0xC)
    long = {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True}
    request = body(sampling_params=long, stream=True, rid="gone")
    with server.http.stream("POST", "/generate", json=request, headers=headers) as stream:
        events = (line for line in stream.iter_lines() if line)
        next(events)
        server.http.post("/abort_request", json={"rid": "gone"})
        last = [event for event in events if event != "data: [DONE]"][-1]
    assert json.loads(last.removeprefix("data: "))["meta_info"]["finish_reason"]["type"] == "abort"
    spans = collector.trace(trace_id, "POST /generate", "llm_request", "engine", "queue", "prefill", "decode")
    assert path_of(spans, "engine") == ["POST /generate", "llm_request", "engine"]
    for name in ("llm_request", "engine"):
        assert spans[name].attributes["multilora.finish_reason"] == "abort"


def test_a_client_that_hangs_up(server, collector):
    trace_id, headers = traced(0xD)
    long = {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True}
    with server.http.stream("POST", "/generate", json=body(sampling_params=long, stream=True), headers=headers) as s:
        next(s.iter_lines())
    spans = collector.trace(trace_id, "POST /generate", "llm_request", "engine")
    assert spans["engine"].attributes["multilora.finish_reason"] == "abort"
    assert spans["engine"].attributes["gen_ai.usage.completion_tokens"] < 2000


def test_what_a_client_does_not_record_is_not_recorded(server, collector):
    _, headers = traced(0xE)
    before = collector.count
    headers["traceparent"] = headers["traceparent"].removesuffix("01") + "00"
    assert server.http.post("/generate", json=body(), headers=headers).status_code == 200
    assert server.http.get("/health").status_code == 200
    later, headers = traced(0xF)
    server.http.post("/generate", json=body(), headers=headers)
    collector.trace(later, "POST /generate")
    assert collector.count == before + 1
