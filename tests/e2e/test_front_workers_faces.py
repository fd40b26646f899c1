"""What is seen of a server with several front processes: over TLS, by traces, on the console, on the routes that read
instead of answering, and with adapters that the resolver loads."""

import shutil
import ssl
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
import torch
from certificates import make_certificate
from classifiers import save_head, scores_of
from otlp import Collector, path_of
from running_server import ANSWERS, GREEDY, PATHS, PROMPT, Server, serving

from multilora.demo import base_model_path

pytestmark = pytest.mark.slow

PARENT = "00f067aa0ba902b7"
CONNECTIONS = 8
"""Enough for either of two processes to get some: the kernel shares them out by their ports."""


@pytest.fixture(scope="module")
def collector():
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A directory of adapters; those of `mood` and its model classify."""
    found = tmp_path_factory.mktemp("adapters")
    for name in ("pirate", "sql", "json"):
        shutil.copytree(PATHS[name], found / name)
    (found / "mood").mkdir()
    return found, save_head(found / "mood", base_model_path(), 3, r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def server(collector, adapters, tmp_path_factory):
    tls = tmp_path_factory.mktemp("tls")
    make_certificate(tls)
    secure = {"scheme": "https", "verify": ssl.create_default_context(cafile=tls / "cert.pem")}
    password = ("--ssl-keyfile-password", "word")
    flags = ("--front-workers", "2", "--ssl-certfile", tls / "cert.pem", "--ssl-keyfile", tls / "locked.pem")
    more = ("--lora-resolver-dir", adapters[0], "--otlp-traces-endpoint", collector.url)
    kind = type("TlsServer", (Server,), secure)
    with serving(tmp_path_factory, *map(str, flags + password + more), server_class=kind) as server:
        yield server


@pytest.fixture
def clients(server) -> Iterator[list[httpx.Client]]:
    """Each has a connection of its own, so that both processes are asked."""
    with ExitStack() as stack:
        yield [stack.enter_context(server.client()) for _ in range(CONNECTIONS)]


def traced(number):
    """A trace id, and the header of a client that records it."""
    trace_id = f"{number:032x}"
    return trace_id, {"traceparent": f"00-{trace_id}-{PARENT}-01"}


def body(**fields):
    return {"text": PROMPT, "sampling_params": GREEDY} | fields


def ask_all(clients, method, path, json=None):
    answers = [client.request(method, path, json=json) for client in clients]
    assert [answer.status_code for answer in answers] == [200] * len(clients), answers[-1].text
    return answers


def test_tls_on_each_process_for_its_own_routes_and_those_of_the_supervisor(server, clients):
    for answer in ask_all(clients, "POST", "/tokenize", {"prompt": "a"}) + ask_all(clients, "GET", "/v1/models"):
        assert "max-age" in answer.headers["strict-transport-security"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http") + "/health")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(server.url + "/health")


def test_an_adapter_that_one_process_has_the_server_look_for(server, clients):
    answers = ask_all(clients, "POST", "/generate", body(lora_path="json"))
    assert {answer.json()["text"].strip() for answer in answers} == {ANSWERS["json"]}
    assert len({answer.json()["meta_info"]["lora_version"] for answer in answers}) == 1  # it was loaded once
    unknown = [client.post("/generate", json=body(lora_path="nobody")) for client in clients]
    assert {answer.json()["error"]["code"] for answer in unknown} == {"UnknownAdapter"}


def test_a_trace_goes_through_worker_supervisor_engine_and_loader(clients, collector):
    for number, client in enumerate(clients):
        trace_id, headers = traced(0xA0 + number)
        assert client.post("/generate", json=body(), headers=headers).status_code == 200
        names = ("POST /generate", "llm_request", "engine", "queue", "prefill", "decode")
        spans = collector.trace(trace_id, *names)
        assert set(spans) == set(names) and spans["POST /generate"].parent_id == PARENT
        assert path_of(spans, "decode") == ["POST /generate", "llm_request", "engine", "decode"]


def test_a_trace_of_a_request_that_loads_an_adapter(server, collector):
    trace_id, headers = traced(0xB)
    assert server.http.post("/generate", json=body(lora_path="pirate"), headers=headers).status_code == 200
    spans = collector.trace(trace_id, "POST /generate", "decode", "loader.fetch", "load_adapter")
    path = ["POST /generate", "load_adapter", "engine.load_adapter", "loader.fetch"]
    assert path_of(spans, "loader.fetch") == path
    assert [spans[name].process for name in path] == ["front", "front", "engine", "loader"]


def test_a_trace_of_a_request_that_is_handed_on(clients, collector):
    for number, client in enumerate(clients):
        trace_id, headers = traced(0xC0 + number)
        assert client.get("/v1/models", headers=headers).status_code == 200
        spans = collector.trace(trace_id, "GET /v1/models")
        assert set(spans) == {"GET /v1/models"} and spans["GET /v1/models"].parent_id == PARENT


def test_embeddings_and_scores(clients):
    rows = [answer.json()["data"][0]["embedding"] for answer in ask_all(clients, "POST", "/v1/embeddings", EMBED)]
    assert all(row == rows[0] for row in rows) and len(rows[0]) > 8
    for path, asked, found, score in SCORED:
        answers = [answer.json()[found] for answer in ask_all(clients, "POST", path, asked)]
        scores = [[one[score] for one in answer] for answer in answers]
        assert len(scores[0]) == 2 and all(row == pytest.approx(scores[0], abs=1e-5) for row in scores)


EMBED = {"model": "multilora-demo", "input": "Paris"}
SCORED = (
    ("/v1/score", {"text_1": "Paris", "text_2": ["France", "Rome"]}, "data", "score"),
    ("/v1/rerank", {"query": "Paris", "documents": ["France", "Rome"]}, "results", "relevance_score"),
)


def test_classes_by_an_adapter_that_is_looked_for(clients, adapters):
    asked = {"model": "mood", "input": "Never again."}
    found = [answer.json()["data"][0]["probs"] for answer in ask_all(clients, "POST", "/v1/classify", asked)]
    ids = clients[0].post("/tokenize", json={"prompt": asked["input"]}).json()["tokens"]
    expected = torch.softmax(scores_of(adapters[1], ids), -1).tolist()
    for probs in found:
        assert probs == pytest.approx(expected, abs=1e-4)


def test_the_console_shows_the_whole_server(server, clients):
    long = body(sampling_params={"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}, stream=True)
    before = clients[0].get("/console/state").json()["counters"]
    with ExitStack() as stack:
        streams = [stack.enter_context(client.stream("POST", "/generate", json=long)) for client in clients[:4]]
        readers = [stream.iter_lines() for stream in streams]  # one that is dropped hangs up
        assert all(next(reader).startswith("data: ") for reader in readers)
        states = [answer.json() for answer in ask_all(clients[4:], "GET", "/console/state")]
    for state in states:
        assert state["queues"] == [{"tenant": "", "waiting": 0, "running": 4}]
        assert {"json", "pirate"} <= {adapter["name"] for adapter in state["adapters"]}
    assert states[-1]["counters"]["first_token"][1] >= before["first_token"][1] + 4
    page = clients[0].get("/console")
    assert page.status_code == 200 and "text/html" in page.headers["content-type"]


def test_the_consoles_log_has_the_lines_of_all_front_processes(clients):
    for answer in ask_all(clients, "GET", "/console/log"):
        lines = answer.json()["lines"]
        messages = [line["message"] for line in lines]
        assert any(message.startswith("ready: https://") for message in messages)
        for name in ("front-1", "front-2"):
            assert any(message.startswith(f"{name}: ") and "connections" in message for message in messages)
        assert [line["number"] for line in lines] == sorted({line["number"] for line in lines})
    last = lines[-1]["number"]
    assert all(line["number"] > last for line in clients[0].get(f"/console/log?after={last}").json()["lines"])
