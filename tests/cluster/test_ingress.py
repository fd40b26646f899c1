"""The ingress: what it reads of requests, whom it asks, and what becomes of requests whose replica is lost.

Covers `ingress.py`, `request_reading.py`, `merged_answers.py`, `autoscaling.py`.
"""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fakes.server_app import Connection
from hypothesis import given
from hypothesis import strategies as st

from multilora.cluster import ingress
from multilora.cluster.autoscaling import ReplicaScaling, desired_replicas
from multilora.cluster.cluster_config import ClusterConfig
from multilora.cluster.cluster_table import ClusterTable, TableChange
from multilora.cluster.ingress import Ingress, ReplicaLostError
from multilora.cluster.merged_answers import merge
from multilora.cluster.request_reading import Reach, reach_of, read_request
from multilora.front.access import Caller, Tenant
from multilora.front.records import AdapterRecord
from multilora.server.key_ring import KeyRing

JSON = [(b"content-type", b"application/json")]
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
TABLE = ClusterTable()
TABLE.apply(
    TableChange(
        seq=1,
        records=[
            AdapterRecord(name="sql", version=3, path="/sql"),
            AdapterRecord(name="acme:sql", version=4, path="/own"),
            AdapterRecord(name="mix", version=5, path="", parts=(("law", 0.5), ("sql", 0.5))),
        ],
    )
)


def start(status=200, headers=JSON):
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(body, more=False):
    return {"type": "http.response.body", "body": body, "more_body": more}


class Replicas:
    """What each replica answers: messages, and LOST where it dies. asked: (replica, path, body) of every attempt."""

    LOST = object()

    def __init__(self, **answers):
        self.answers, self.asked, self.closed = answers, [], 0

    async def send(self, request, only, scope, body):
        name = only or next(name for name in self.answers if name not in request.avoid)
        self.asked.append((name, scope["path"], body))
        yield [{"type": "multilora.replica", "name": name}]
        try:
            for message in self.answers[name]:
                if message is self.LOST:
                    raise ReplicaLostError
                if message == "wait":
                    await asyncio.sleep(100)
                yield [message]
        finally:
            self.closed += 1

    async def members(self):
        return list(self.answers)


def ingress_of(replicas, **serve):
    config = ClusterConfig.make({"state_dir": "/none", "serve": {"served_model_name": "base", **serve}})
    return Ingress(config, KeyRing(config.engine), TABLE, replicas.send, replicas.members)


def ask(replicas, path="/v1/completions", body=None, method="POST", **serve):
    async def whole():
        connection = Connection(ingress_of(replicas, **serve), method, path, body or {"model": "sql"})
        return await connection.answer()

    return asyncio.run(whole())


def test_an_answer_is_passed_on_as_it_is():
    replicas = Replicas(a=[start(418), part(b'{"x":', True), part(b"1}")])
    answer = ask(replicas, body={"model": "sql", "prompt": "hi"})
    assert (answer.status, answer.json()) == (418, {"x": 1})
    assert replicas.asked == [("a", "/v1/completions", b'{"model": "sql", "prompt": "hi"}')]


@pytest.mark.parametrize("lost", [[], [start(headers=SSE)]])
def test_what_has_not_begun_goes_to_another_replica_with_the_same_body(lost):
    replicas = Replicas(a=[*lost, Replicas.LOST], b=[start(), part(b"{}")])
    answer = ask(replicas)
    assert answer.status == 200
    assert [name for name, *_ in replicas.asked] == ["a", "b"] and len({body for *_, body in replicas.asked}) == 1


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        ("/v1/completions", "data: [DONE]"),
        ("/generate", "data: [DONE]"),
        ("/v1/messages", "event: error"),
        ("/v1/responses", "event: error"),
    ],
)
def test_a_stream_that_has_begun_ends_with_an_error_that_says_to_try_again(path, ending):
    replicas = Replicas(a=[start(headers=SSE), part(b"data: {}\n\n", True), Replicas.LOST], b=[start(), part(b"{}")])
    answer = ask(replicas, path)
    assert len(replicas.asked) == 1
    assert answer.text.startswith("data: {}\n\n") and ending in answer.text and "send it again" in answer.text


def test_an_answer_that_is_no_stream_and_has_begun_is_cut_off():
    replicas = Replicas(a=[start(), part(b"[1,", True), Replicas.LOST])
    with pytest.raises(Exception, match="send it again"):
        ask(replicas)


def test_a_replica_that_cannot_serve_now_is_not_the_last_word():
    busy = json.dumps({"error": {"code": "EngineRestarting"}}).encode()
    full = json.dumps({"error": {"code": "QueueFull"}}).encode()
    replicas = Replicas(a=[start(503), part(busy)], b=[start(503), part(full)])
    assert ask(replicas).json()["error"]["code"] == "QueueFull"  # which is for the client to hear
    replicas = Replicas(a=[start(503), part(busy)], b=[start(503), part(busy)], c=[start(503), part(busy)])
    assert ask(replicas).json()["error"]["code"] == "EngineRestarting" and len(replicas.asked) == 3


def test_when_all_are_lost_the_error_says_to_try_again():
    replicas = Replicas(a=[Replicas.LOST], b=[Replicas.LOST], c=[Replicas.LOST])
    answer = ask(replicas, "/v1/messages")
    assert answer.status == 503 and answer.headers["retry-after"]
    assert answer.json()["error"]["type"] == "overloaded_error"


def test_hanging_up_ends_the_request_at_the_replica():
    async def whole():
        replicas = Replicas(a=[start(headers=SSE), part(b"data: {}\n\n", True), "wait"])
        connection = Connection(ingress_of(replicas), "POST", "/generate", {"text": "x"})
        await connection.next()
        await connection.next()
        connection.hang_up()
        await connection.answer()
        return replicas.closed

    assert asyncio.run(whole()) == 1


def test_bodies_with_adapters_may_be_long_and_are_read_in_turn(monkeypatch):
    replicas = Replicas(a=[start(), part(b"{}")])
    long = {"lora_name": "x", "serialized_tensors": "A" * 5000}
    assert ask(replicas, "/load_lora_adapter_from_tensors", long, max_body_bytes=1000).status == 200
    assert json.loads(replicas.asked.pop()[2]) == long
    ask(replicas, "/generate", {"text": "A" * 5000}, max_body_bytes=1000)
    assert len(replicas.asked.pop()[2]) == 1001  # which the replica refuses

    async def many():
        waiting = Replicas(a=["wait"])
        served = ingress_of(waiting)
        connections = [Connection(served, "POST", "/load_lora_adapter_from_tensors", long) for _ in range(5)]
        tasks = [asyncio.create_task(connection.answer()) for connection in connections]
        await asyncio.sleep(0.1)
        asked = len(waiting.asked)
        for task in tasks:
            task.cancel()
        for connection in connections:
            connection.hang_up()
        await asyncio.gather(*tasks, return_exceptions=True)
        return asked

    assert asyncio.run(many()) == ingress.TENSORS_AT_A_TIME


def test_changes_of_a_server_reach_all_and_health_is_the_ingress_own():
    replicas = Replicas(a=[start(), part(b"ok")], b=[start(500), part(b"no")])
    assert ask(replicas, "/flush_cache").text == "no" and len(replicas.asked) == 2
    assert ask(Replicas(), "/health", method="GET").status == 200
    assert ask(Replicas(), "/ready", method="GET").status == 503
    assert ask(Replicas(), "/flush_cache").status == 503


def test_who_does_not_answer_holds_up_nobody_who_watches(monkeypatch):
    monkeypatch.setattr(ingress, "WHOLE_SECONDS", 0.1)
    replicas = Replicas(a=["wait"], b=[start(), part(b"n 1\n")], c=[Replicas.LOST])
    assert ask(replicas, "/metrics", method="GET").text == 'n{replica="b"} 1\n'


def test_a_stored_response_is_asked_of_its_replica():
    replicas = Replicas(a=[start(404), part(b"{}")], b=[start(), part(b'{"id": "resp_1"}')])
    assert ask(replicas, "/v1/responses/resp_1", method="GET").json() == {"id": "resp_1"}
    replicas.asked.clear()
    ask(replicas, "/v1/responses", {"model": "sql", "previous_response_id": "resp_1"})
    assert replicas.asked[-1][:2] == ("b", "/v1/responses")


def test_metrics_are_those_of_all_with_a_label():
    text = b'# HELP n Requests\n# TYPE n counter\nn 1\nn{x="1"} 2\n'
    merged = merge("/metrics", [("a", 200, JSON, text), ("b", 200, JSON, text)])
    assert merged[2].decode().splitlines() == [
        "# HELP n Requests", "# TYPE n counter",
        'n{replica="a"} 1', 'n{replica="a",x="1"} 2', 'n{replica="b"} 1', 'n{replica="b",x="1"} 2',
    ]  # fmt: skip
    loads = [(name, 200, JSON, json.dumps({"loads": [{"dp_rank": 0, "n": name}]}).encode()) for name in "ab"]
    assert json.loads(merge("/v1/loads", loads)[2]) == {"loads": [{"dp_rank": 0, "n": "a"}, {"dp_rank": 1, "n": "b"}]}


@pytest.mark.parametrize(
    ("path", "reach"),
    [
        ("/generate", Reach.ONE),
        ("/v1/load_lora_adapter", Reach.ONE),
        ("/flush_cache", Reach.ALL),
        ("/abort_request", Reach.ALL),
        ("/metrics", Reach.SUM),
    ],
)
def test_whom_a_route_concerns(path, reach):
    assert reach_of(path) is reach


ANYBODY = Caller(key_id="")
ACME = Caller(key_id="k", tenant=Tenant("acme"))


def read(content, caller=ANYBODY, headers=()):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_request({"headers": list(headers), "method": "POST"}, body, TABLE, "base", caller)


@pytest.mark.parametrize(
    ("content", "name", "version"),
    [
        ({"model": "sql"}, "sql", 3),
        ({"model": "base:sql"}, "sql", 3),
        ({"model": "base", "lora_path": "sql"}, "sql", 3),
        ({"lora_path": [None, "sql"]}, "sql", 3),
        ({"lora_path": [{"name": "sql", "weight": 0.5}]}, "sql", 3),
        ({"model": "mix"}, "law", 0),
        ({"model": "unknown"}, "unknown", 0),
        ({"lora_name": "sql", "lora_path": "/there"}, "sql", 3),
    ],
)
def test_which_adapter_a_request_names(content, name, version):
    need = read(content).adapter
    assert (need.name, need.version) == (name, version)


def test_a_tenants_own_adapter_comes_before_the_operators():
    assert read({"model": "sql"}, ACME).adapter.name == "acme:sql"
    assert read({"model": "sql", "prompt_cache_key": "s"}, ACME).session == "acme\0s"
    assert read({"prompt": "x" * 300}).prefixes != read({"prompt": "x" * 300}, ACME).prefixes


def test_prompts_and_sessions_of_every_dialect_are_read():
    long = "x" * 400
    for content in (
        {"prompt": long}, {"text": long}, {"input": long}, {"input_ids": list(range(400))},
        {"messages": [{"role": "user", "content": long}]},
    ):  # fmt: skip
        assert read(content).prefixes
    assert read({"model": "base"}, headers=[(b"x-session-id", b"7")]).session == "\x007"
    assert read({"prompt": "short"}).prefixes == ()


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ({"prompt": "x" * 400}, 100),
        ({"input_ids": [1] * 77}, 77),
        ({"prompt": [1, 2, 3]}, 3),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, pytest.approx(1000, rel=0.02)),
        ({"model": "base"}, 0),
    ],
)
def test_how_long_a_prompt_is_about(content, tokens):
    assert read(content).prompt == tokens


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_body_is_too_strange_to_be_routed(content):
    for name in ("model", "lora_path", "prompt", "messages", "prompt_cache_key", "lora_name"):
        read({name: content})
    read(b"\xff{")


def test_replicas_are_as_many_as_requests_and_adapters_need():
    assert desired_replicas(2, 64, 0.1, 32, 0.8) == 2
    assert desired_replicas(2, 65, 0.1, 32, 0.8) == 3
    assert desired_replicas(4, 10, 1.0, 32, 0.8) == 5
    assert desired_replicas(4, 0, 0.0, 32, 0.8) == 1


@pytest.mark.parametrize(("metrics", "wanted"), [({"pressure": {"a": 1.0, "b": 0.6}}, 4), ({}, 1), (None, 1)])
def test_the_autoscaler_asks_for_both(metrics, wanted):
    context = SimpleNamespace(aggregated_metrics=metrics, current_num_replicas=2, total_num_requests=10)
    assert ReplicaScaling(32, 0.4)(context) == (wanted, {})
