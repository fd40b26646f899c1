"""Loading and unloading while requests run, in SGLang's and vLLM's shapes."""

import asyncio

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run

from multilora.errors import AdapterInvalid, AdapterNotFound, AdapterStarvation, AdapterUnavailable
from multilora.lora_path import LoraPath

KEYS = ["rid", "http_worker_ipc", "success", "error_message", "loaded_adapters"]


def server(**config):
    return LocalServer(FakeEngineClient(), None, **config)


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def test_load_and_unload_in_sglangs_shape():
    s = server()
    answer = s.post("/load_lora_adapter", {"lora_name": "a", "lora_path": "/p/a"})
    assert answer.status == 200
    assert answer.json() == {
        "rid": None,
        "http_worker_ipc": None,
        "success": True,
        "error_message": "",
        "loaded_adapters": {"a": "/p/a"},
    }
    assert list(answer.json()) == KEYS
    s.post("/load_lora_adapter", {"lora_name": "b", "lora_path": "/p/b", "pinned": True})
    assert s.client.loaded == {1: "/p/a", 2: "/p/b"}
    answer = s.post("/unload_lora_adapter", {"lora_name": "a"})
    assert answer.status == 200
    assert answer.json()["loaded_adapters"] == {"b": "/p/b"}
    assert s.client.unloaded == [1]


BAD_LOADS = {
    "already loaded": ({"lora_name": "a", "lora_path": "/p/x"}, "already loaded"),
    "no path": ({"lora_name": "b"}, "lora_path: this field is required"),
    "no name": ({"lora_path": "/p/b"}, "lora_name: this field is required"),
    "wrong type": ({"lora_name": 5, "lora_path": "/p/b"}, "lora_name"),
    "the base model's name": ({"lora_name": "base", "lora_path": "/p/b"}, "base model"),
    "unknown field": ({"lora_name": "b", "lora_path": "/p/b", "rank": 4}, "rank: not supported"),
    "missing path": ({"lora_name": "b", "lora_path": "/gone"}, "no such directory"),
    "invalid": ({"lora_name": "b", "lora_path": "/broken"}, "not valid"),
    "starvation": ({"lora_name": "b", "lora_path": "/pin", "pinned": True}, "starvation"),
    "not JSON": (b"{", "not valid JSON"),
    "not an object": ([], "must be a JSON object"),
}


@pytest.mark.parametrize(("body", "words"), BAD_LOADS.values(), ids=BAD_LOADS)
def test_a_failed_load_keeps_the_shape_and_changes_nothing(body, words):
    s = server()
    s.load("a")
    s.client.load_errors = {
        "/gone": AdapterNotFound("no such directory: /gone"),
        "/broken": AdapterInvalid("adapter_model.safetensors is not valid"),
        "/pin": AdapterStarvation("starvation: it would be the last place"),
    }
    answer = s.post("/load_lora_adapter", body)
    assert answer.status == 400
    assert list(answer.json()) == KEYS
    assert answer.json()["success"] is False
    assert words in answer.json()["error_message"]
    assert answer.json()["loaded_adapters"] == {"a": "/adapters/a"}
    assert s.post("/load_lora_adapter", {"lora_name": "b", "lora_path": "/p/b"}).status == 200


def test_unload_of_an_unknown_name():
    answer = server().post("/unload_lora_adapter", {"lora_name": "nope"})
    assert answer.status == 400
    assert "does not exist" in answer.json()["error_message"]


def test_dead_engine():
    s = server()
    s.client.die()
    assert s.post("/load_lora_adapter", {"lora_name": "a", "lora_path": "/p"}).status == 503


def test_vllms_routes():
    s = server()
    load = {"lora_name": "a", "lora_path": "/p/a"}
    answer = s.post("/v1/load_lora_adapter", load)
    assert (answer.status, answer.text) == (200, "Success: LoRA adapter 'a' added successfully.")
    answer = s.post("/v1/load_lora_adapter", load)
    assert answer.status == 400
    assert "has already been loaded" in answer.error["message"]
    s.client.load_errors = {"/gone": AdapterNotFound("no such directory"), "/bad": AdapterInvalid("NaN")}
    assert s.post("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "/gone"}).status == 404
    assert s.post("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "/bad"}).status == 400
    assert s.post("/v1/load_lora_adapter", {"lora_name": "b"}).error["param"] == "lora_path"
    answer = s.post("/v1/unload_lora_adapter", {"lora_name": "a", "lora_int_id": 7})
    assert (answer.status, answer.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
    answer = s.post("/v1/unload_lora_adapter", {"lora_name": "a"})
    assert answer.status == 404
    assert "cannot be found" in answer.error["message"]


def test_unload_waits_for_its_requests_while_nothing_else_waits():
    s = server()
    s.load("a", "b")

    async def scenario():
        s.client.gate.clear()
        running = s.connect("POST", "/generate", {"input_ids": [5], "lora_path": "a"})
        await until(lambda: s.client.submitted)
        unload = s.connect("POST", "/unload_lora_adapter", {"lora_name": "a"})
        await until(lambda: "a" not in s.registry.loaded())
        answer = await s.send("POST", "/generate", {"input_ids": [5], "lora_path": "a"})
        assert answer.status == 400
        assert "being unloaded" in answer.error["message"]
        answer = await s.send("POST", "/load_lora_adapter", {"lora_name": "a", "lora_path": "/p"})
        assert "being unloaded" in answer.json()["error_message"]
        other = s.connect("POST", "/generate", {"input_ids": [5], "lora_path": "b"})
        assert (await s.send("POST", "/load_lora_adapter", {"lora_name": "c", "lora_path": "/p"})).status == 200
        assert not unload.task.done()
        assert s.client.unloaded == []
        s.client.gate.set()
        assert (await running.answer()).json()["meta_info"]["finish_reason"]["type"] == "length"
        assert (await unload.answer()).status == 200
        assert s.client.unloaded == [1]
        assert (await other.answer()).status == 200
        answer = await s.send("POST", "/generate", {"input_ids": [5], "lora_path": "a"})
        assert "never been loaded" in answer.error["message"]

    run(scenario())


def test_an_unload_goes_on_when_its_client_hangs_up():
    s = server()
    s.load("a")

    async def scenario():
        s.client.gate.clear()
        running = s.connect("POST", "/generate", {"input_ids": [5], "lora_path": "a"})
        await until(lambda: s.client.submitted)
        unload = s.connect("POST", "/unload_lora_adapter", {"lora_name": "a"})
        await until(lambda: "a" not in s.registry.loaded())
        unload.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unload.task
        s.client.gate.set()
        await running.answer()
        await until(lambda: s.client.unloaded == [1])

    run(scenario())


def test_load_inplace_swaps_and_requests_in_flight_finish_on_the_old_version():
    s = server()
    s.load("a")

    async def scenario():
        s.client.gate.clear()
        old = s.connect("POST", "/generate", {"input_ids": [5], "lora_path": "a"})
        await until(lambda: s.client.submitted)
        swap = {"lora_name": "a", "lora_path": "/p/new", "load_inplace": True}
        assert (await s.send("POST", "/v1/load_lora_adapter", swap)).status == 200
        assert s.registry.loaded() == {"a": "/p/new"}
        new = s.connect("POST", "/generate", {"input_ids": [5], "lora_path": "a"})
        await until(lambda: len(s.client.submitted) == 2)
        assert [m.adapters for m in s.client.submitted] == [((1, 1.0),), ((2, 1.0),)]
        assert s.client.unloaded == []
        s.client.gate.set()
        assert [(await call.answer()).status for call in (old, new)] == [200, 200]
        await until(lambda: s.client.unloaded == [1])
        assert s.client.loaded == {2: "/p/new"}

    run(scenario())


def test_lora_paths_are_all_loaded_in_their_order():
    s = server()
    paths = [LoraPath(f"n{i}", f"/p/{i}", i == 3) for i in range(20)]
    run(s.load_many(paths))
    assert list(s.registry.loaded()) == [p.lora_name for p in paths]
    assert [e.pinned for e in s.registry.refs()] == [p.pinned for p in paths]
    assert len(s.client.loaded) == 20


def test_one_bad_path_of_lora_paths_is_an_error_and_leaves_nothing():
    s = server()
    s.client.load_errors = {"/p/1": AdapterNotFound("no such directory: /p/1")}
    with pytest.raises(AdapterNotFound, match="/p/1"):
        run(s.load_many([LoraPath("x", "/p/0"), LoraPath("y", "/p/1")]))
    assert s.registry.loaded() == {}


REPLACING = {
    "a field": ("/load_lora_adapter", {"upsert": True}),
    "a query": ("/load_lora_adapter?inplace=1", {}),
    "vLLM's field": ("/v1/load_lora_adapter", {"load_inplace": True}),
    "ours on vLLM's route": ("/v1/load_lora_adapter", {"upsert": True}),
    "a query on vLLM's route": ("/v1/load_lora_adapter?inplace=true", {}),
    "SkyRL's route": ("/skyrl/v1/load_lora_adapter", {}),
}


@pytest.mark.parametrize(("route", "fields"), REPLACING.values(), ids=REPLACING)
def test_every_way_to_replace_loads_what_is_not_loaded_too(route, fields):
    s = server()
    for path in ("/p/1", "/p/2"):
        assert s.post(route, {"lora_name": "a", "lora_path": path} | fields).status == 200
        assert s.registry.loaded() == {"a": path}
    mix = {"lora_name": "mix", "lora_path": [{"name": "a"}]} | fields
    assert [s.post(route, mix).status for _ in range(2)] == [200, 200]
    assert s.post("/load_lora_adapter?inplace=0", {"lora_name": "a", "lora_path": "/p"}).status == 400
    answer = s.post("/load_lora_adapter?inplace=maybe", {"lora_name": "a", "lora_path": "/p"})
    assert answer.status == 400 and "inplace" in answer.json()["error_message"]


def test_skyrls_answer():
    s = server()
    body = {"lora_name": "a", "lora_path": "/p/a"}
    for version in (1, 2):
        answer = s.post("/skyrl/v1/load_lora_adapter", body)
        assert answer.json() == {"status": "ok", "lora_name": "a", "lora_int_id": version}
    s.client.load_errors = {"/gone": AdapterNotFound("no such directory")}
    assert s.post("/skyrl/v1/load_lora_adapter", body | {"lora_path": "/gone"}).status == 404
    assert s.registry.loaded() == {"a": "/p/a"}


def test_prime_rl_loads_the_same_name_each_step_without_saying_so():
    s = server(lora_load_mode="upsert")
    for step in range(3):
        body = {"lora_name": "policy", "lora_path": f"/steps/{step}"}
        assert s.post("/load_lora_adapter", body).status == 200
        assert s.registry.loaded() == {"policy": f"/steps/{step}"}
    s.client.load_errors = {"/steps/3": AdapterNotFound("not there yet"), "/steps/4": AdapterInvalid("NaN")}
    answer = s.post("/load_lora_adapter", {"lora_name": "policy", "lora_path": "/steps/3"})
    assert answer.status == 404, "it asks again then"
    assert list(answer.json()) == KEYS and answer.json()["error_message"] == "not there yet"
    assert s.post("/load_lora_adapter", {"lora_name": "policy", "lora_path": "/steps/4"}).status == 400
    assert s.registry.loaded() == {"policy": "/steps/2"}


def test_an_upsert_that_is_sent_again_before_it_has_ended():
    s = server()

    async def scenario():
        body = {"lora_name": "a", "lora_path": "/p/a", "upsert": True}
        twice = [s.connect("POST", "/load_lora_adapter", body) for _ in range(2)]
        assert [(await call.answer()).status for call in twice] == [200, 200]
        await until(lambda: s.client.unloaded == [1])
        assert s.client.loaded == {2: "/p/a"}

    run(scenario())


def test_a_composition_cannot_update_running_requests():
    s = server()
    s.load("a", "b")
    parts = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]
    body = {"lora_name": "sum", "lora_path": parts, "allow_update_mid_request": True}
    answer = s.post("/load_lora_adapter", body)
    assert answer.status == 400
    assert "allow_update_mid_request: a composition" in answer.json()["error_message"]
    assert s.post("/load_lora_adapter", body | {"allow_update_mid_request": False}).status == 200


@pytest.mark.parametrize("path", ["/load_lora_adapter", "/v1/load_lora_adapter", "/skyrl/v1/load_lora_adapter"])
def test_a_load_while_the_loader_is_down_is_503_with_retry_after(path):
    s = LocalServer(FakeEngineClient(), None)
    s.client.load_errors["/x"] = AdapterUnavailable("the loader process was killed by signal 9")
    answer = s.post(path, {"lora_name": "x", "lora_path": "/x"})
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "signal 9" in answer.text
    del s.client.load_errors["/x"]
    assert s.post(path, {"lora_name": "x", "lora_path": "/x"}).status == 200
