"""Compositions on every route: in requests, named, listed, counted, refused."""

import asyncio

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

A = {"name": "a", "weight": 0.7}
B = {"name": "b", "weight": -2}
MIX = ((1, 0.7), (2, -2.0))


def server(**config):
    s = LocalServer(FakeEngineClient(vocab_size=320), byte_level_tokenizer(), **config)
    s.load("a", "b")
    return s


def adapters(s):
    return [message.adapters for message in s.client.submitted]


def test_native_one_for_all_and_one_each():
    s = server()
    assert s.post("/generate", {"input_ids": [5], "lora_path": [A, B]}).status == 200
    assert s.post("/generate", {"input_ids": [[5], [6]], "lora_path": [A, B]}).status == 200
    each = {"input_ids": [[5], [6], [7], [8]], "lora_path": [[A, B], None, "b", [B]]}
    assert s.post("/generate", each).status == 200
    assert adapters(s) == [MIX, MIX, MIX, MIX, (), ((2, 1.0),), ((2, -2.0),)]


@pytest.mark.parametrize("stream", [False, True])
def test_openai_routes(stream):
    s = server()
    chat = {"messages": [{"role": "user", "content": "x"}], "model": "base", "lora_path": [A, B], "stream": stream}
    assert s.post("/v1/chat/completions", chat).status == 200
    one = {"prompt": ["x", "y"], "model": "base", "lora_path": [A, B], "stream": stream}
    assert s.post("/v1/completions", one).status == 200
    each = {"prompt": ["x", "y"], "model": "base:", "lora_path": [[A, B], "a"], "stream": stream}
    assert s.post("/v1/completions", each).status == 200
    assert adapters(s) == [MIX, MIX, MIX, MIX, ((1, 1.0),)]
    assert s.post("/v1/chat/completions", chat | {"model": "a"}).error["param"] == "lora_path"


REFUSED = {
    "unknown": ([A, {"name": "nope"}], "'nope' has never been loaded"),
    "not composable": ([A, {"name": "d"}], "adapter 'd' cannot be composed: it uses DoRA"),
    "weighted": ([{"name": "d", "weight": 0.5}], "adapter 'd' cannot be composed: it uses DoRA"),
    "too many": ([A, B, {"name": "c"}, {"name": "d"}], "4 adapters; --max-loaded-loras is 3"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("route", ["/generate", "/v1/completions", "/load_lora_adapter", "/v1/load_lora_adapter"])
def test_refused(name, route):
    s = server(max_loaded_loras=3)
    s.client.not_composable_reason["/adapters/d"] = "it uses DoRA"
    s.load("c", "d")
    lora_path, message = REFUSED[name]
    listed = s.registry.loaded()
    body = {
        "/generate": {"input_ids": [5]},
        "/v1/completions": {"prompt": "x", "model": "base"},
        "/load_lora_adapter": {"lora_name": "mix"},
        "/v1/load_lora_adapter": {"lora_name": "mix"},
    }[route]
    answer = s.post(route, body | {"lora_path": lora_path})
    assert answer.status == 400
    assert message in answer.text
    assert s.client.submitted == []
    assert s.registry.loaded() == listed


def test_a_named_composition():
    s = server()
    answer = s.post("/load_lora_adapter", {"lora_name": "mix", "lora_path": [A, B]})
    assert answer.status == 200
    assert answer.json()["loaded_adapters"] == {"a": "/adapters/a", "b": "/adapters/b", "mix": "0.7 * a + -2 * b"}
    card = s.get("/v1/models").json()["data"][-1]
    assert (card["id"], card["root"], card["parent"]) == ("mix", "0.7 * a + -2 * b", "base")
    found = s.get("/server_info").json()["loaded_adapters"][-1]
    assert found["lora_name"] == "mix"
    assert found["parts"] == [A, B]
    for model in ("mix", "base:mix"):
        assert s.post("/v1/completions", {"prompt": "x", "model": model}).status == 200
    assert s.post("/generate", {"input_ids": [[5], [6]], "lora_path": ["mix", None]}).status == 200
    assert adapters(s) == [MIX, MIX, MIX, ()]

    answer = s.post("/unload_lora_adapter", {"lora_name": "a"})
    assert answer.status == 400
    assert "part of composition 'mix'" in answer.json()["error_message"]
    assert s.post("/v1/unload_lora_adapter", {"lora_name": "b"}).status == 400
    assert s.post("/unload_lora_adapter", {"lora_name": "mix"}).status == 200
    assert s.client.unloaded == []  # the engine never knew it
    assert s.post("/generate", {"input_ids": [5], "lora_path": "mix"}).status == 400
    assert s.post("/unload_lora_adapter", {"lora_name": "a"}).status == 200


def test_vllms_route_names_and_replaces_compositions():
    s = server()
    load = {"lora_name": "mix", "lora_path": [A]}
    assert s.post("/v1/load_lora_adapter", load).text == "Success: LoRA adapter 'mix' added successfully."
    assert "already been loaded" in s.post("/v1/load_lora_adapter", load).error["message"]
    assert s.post("/v1/load_lora_adapter", load | {"lora_path": [B], "load_inplace": True}).status == 200
    assert s.post("/generate", {"input_ids": [5], "lora_path": "mix"}).status == 200
    assert adapters(s) == [((2, -2.0),)]
    assert s.post("/load_lora_adapter", load | {"lora_name": "m", "pinned": True}).status == 400
    assert s.post("/v1/unload_lora_adapter", {"lora_name": "mix"}).status == 200


def test_unloading_a_composition_waits_for_its_requests():
    s = server()
    s.post("/load_lora_adapter", {"lora_name": "mix", "lora_path": [A, B]})

    async def scenario():
        s.client.gate.clear()
        call = s.connect("POST", "/generate", {"input_ids": [5], "lora_path": "mix"})
        while not s.client.submitted:
            await asyncio.sleep(0)
        gone = s.connect("POST", "/unload_lora_adapter", {"lora_name": "mix"})
        while "mix" in s.registry.loaded():
            await asyncio.sleep(0)
        answer = await s.send("POST", "/generate", {"input_ids": [5], "lora_path": "mix"})
        assert "being unloaded" in answer.text
        assert not gone.task.done()
        s.client.gate.set()
        assert (await call.answer()).status == (await gone.answer()).status == 200

    run(scenario())
    assert 'adapter_name="mix"' not in s.get("/metrics").text


def test_a_composition_counts_once():
    s = server()
    s.post("/load_lora_adapter", {"lora_name": "mix", "lora_path": [A, B]})
    for lora_path in ([A, B], "mix", "a", None):
        s.post("/generate", {"input_ids": [5], "lora_path": lora_path, "sampling_params": {"max_new_tokens": 2}})
    text = s.get("/metrics").text
    for name, count in {"a": 2, "mix": 1, "base": 1}.items():
        assert f'multilora:requests_started_total{{adapter_name="{name}"}} {count}.0' in text
    assert 'adapter_name="b"' not in text
