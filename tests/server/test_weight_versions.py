"""Which weights an answer comes from, as SGLang, vLLM and we say it; and the routes of the server's own label."""

import asyncio
from typing import Any

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
LOAD = "/load_lora_adapter?inplace=1"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def server() -> LocalServer:
    client = FakeEngineClient(vocab_size=320, eos_token_ids=(1,), answer=lambda _: TOKENIZER.encode("hello")[1:])
    return LocalServer(client, TOKENIZER)


def named(weight_version: str, lora_version: int | None) -> dict[str, Any]:
    return {"weight_version": weight_version, "lora_version": lora_version}


def native(server: LocalServer, adapter: str | None) -> dict[str, Any]:
    meta = server.post("/generate", {"text": "x", "lora_path": adapter}).json()["meta_info"]
    return {key: meta[key] for key in ("weight_version", "lora_version")}


def test_answers_name_the_version_and_the_callers_label(server: LocalServer) -> None:
    assert native(server, None) == named("default", None)
    for step in (1, 2):
        server.post(LOAD, {"lora_name": "a", "lora_path": "/p", "weight_version": f"step {step}"})
        assert native(server, "a") == named(f"step {step}", step)
    server.post("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "/p", "weight_version": "b"})
    assert native(server, "b") == named("b", 3)
    for body in ({"prompt": "x"}, CHAT):
        route = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        answer = server.post(route, body | {"model": "a"}).json()
        assert answer["metadata"] == named("step 2", 2)
        assert "weight_versions" not in answer["choices"][0]


def test_the_servers_label_is_for_what_has_none_of_its_own(server: LocalServer) -> None:
    server.load("plain")
    server.post("/load_lora_adapter", {"lora_name": "named", "lora_path": "/p", "weight_version": "own"})
    assert server.get("/weight_info").json() == {"weight_version": "default"}
    answer = server.post("/update_weight_version", {"new_version": "7"})
    assert answer.json() == {"success": True, "message": "Weight version updated to 7", "new_version": "7"}
    assert server.get("/weight_info").json() == {"weight_version": "7"}
    assert server.get("/model_info").json()["weight_version"] == "7"
    assert native(server, None) == named("7", None)
    assert native(server, "plain") == named("7", 1)
    assert native(server, "named") == named("own", 2)
    for bad in ({}, {"new_version": ""}, {"new_version": 7}, {"new_version": "x" * 257}):
        assert server.post("/update_weight_version", bad).status == 400
    assert server.get("/weight_info").json() == {"weight_version": "7"}


def test_model_cards_have_what_clients_of_an_adapter_read(server: LocalServer) -> None:
    server.load("plain")
    server.post("/load_lora_adapter", {"lora_name": "named", "lora_path": "/p", "weight_version": "own"})
    cards = server.get("/v1/models").json()["data"]
    assert [(m["id"], m["max_model_len"], m["version"], m["weight_version"]) for m in cards] == [
        ("base", 256, None, "default"),
        ("plain", 256, 1, "default"),
        ("named", 256, 2, "own"),
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [{"prompt": ["x", "y"]}, CHAT | {"n": 2}])
def test_vllms_spans_when_they_are_asked_for(server: LocalServer, body: dict[str, Any], stream: bool) -> None:
    server.post(LOAD, {"lora_name": "a", "lora_path": "/p", "weight_version": "1"})
    route = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    answer = server.post(route, body | {"model": "a", "return_weight_versions": True, "stream": stream})
    frames = answer.frames if stream else [answer.json()]
    choices = [choice for frame in frames for choice in frame["choices"]]
    last = [choice for choice in choices if choice["finish_reason"]]
    assert [choice for choice in choices if "weight_versions" in choice] == last
    assert sorted(choice["index"] for choice in last) == [0, 1]
    for choice in last:
        assert choice["weight_versions"] == [
            {"version": "1", "start": 0, "end": len(TOKENIZER.encode("hello")[1:]), "lora_version": 1}
        ]
    assert [frame["metadata"] for frame in frames if "metadata" in frame] == [named("1", 1)] * (2 if stream else 1)


def test_a_request_in_flight_keeps_its_version_and_label(server: LocalServer) -> None:
    async def scenario() -> None:
        body = {"lora_name": "a", "lora_path": "/p", "weight_version": "old"}
        assert (await server.send("POST", LOAD, body)).status == 200
        server.client.gate.clear()
        calls = [server.connect("POST", "/generate", {"text": "x", "lora_path": name}) for name in ("a", None)]
        while len(server.client.submitted) < 2:
            await asyncio.sleep(0)
        assert (await server.send("POST", LOAD, body | {"weight_version": "new"})).status == 200
        assert (await server.send("POST", "/update_weight_version", {"new_version": "7"})).status == 200
        server.client.gate.set()
        metas = [(await call.answer()).json()["meta_info"] for call in calls]
        assert [(m["weight_version"], m["lora_version"]) for m in metas] == [("old", 1), ("default", None)]

    run(scenario())


@pytest.mark.parametrize(("abort", "reason"), [(True, "abort"), (False, "length")])
def test_sglangs_update_may_abort_what_runs(server: LocalServer, abort: bool, reason: str) -> None:
    async def scenario() -> None:
        server.client.gate.clear()
        call = server.connect("POST", "/generate", {"text": "x"})
        while not server.client.submitted:
            await asyncio.sleep(0)
        update = {"new_version": "7", "abort_all_requests": abort}
        assert (await server.send("POST", "/update_weight_version", update)).status == 200
        server.client.gate.set()
        assert (await call.answer()).json()["meta_info"]["finish_reason"]["type"] == reason

    run(scenario())
