"""`/load_lora_adapter_from_tensors`: what is written where, what is refused, and when the files go."""

import asyncio
import base64
import json
import pickle

import pytest
import torch
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from safetensors.torch import load_file, save

from multilora.adapter_tools.share import SharedAdapter
from multilora.errors import AdapterInvalid
from multilora.server import tensors

ROUTE = "/load_lora_adapter_from_tensors"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
WEIGHTS = save({"base_model.model.x.lora_A.weight": torch.ones(2, 8)})


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


BODY = {"lora_name": "a", "config_dict": CONFIG, "serialized_tensors": encoded(WEIGHTS)}


@pytest.fixture
def server():
    return LocalServer(FakeEngineClient(), None)


def spooled(server) -> list[str]:
    """The folders that exist now."""
    root = server.spool.root
    return sorted(path.name for path in root.iterdir())


def test_the_answer_is_that_of_a_load(server):
    answer = server.post(ROUTE, BODY)
    assert answer.status == 200
    assert answer.json() == {
        "rid": None,
        "http_worker_ipc": None,
        "success": True,
        "error_message": "",
        "loaded_adapters": {"a": "__tensor__"},
    }
    assert [m["root"] for m in server.get("/v1/models").json()["data"] if m["id"] == "a"] == ["__tensor__"]


def test_the_engine_gets_a_directory_as_peft_saves_it(server):
    server.post(ROUTE, BODY | {"pinned": True, "load_format": "safetensors", "added_tokens_config": None})
    folder = server.spool.root / "1"
    assert server.client.loaded == {1: str(folder)}
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert json.loads((folder / "adapter_config.json").read_text()) == CONFIG
    assert server.registry.refs()[0].pinned


def test_weights_longer_than_a_chunk(server, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", 16)
    for name, size in {"a": 0, "b": 1, "c": 2}.items():
        server.post(ROUTE, BODY | {"lora_name": name, "serialized_tensors": encoded(WEIGHTS + b"x" * size)})
    written = [(server.spool.root / v / "adapter_model.safetensors") for v in "123"]
    assert [path.read_bytes() for path in written] == [WEIGHTS, WEIGHTS + b"x", WEIGHTS + b"xx"]


def test_sglangs_newer_field_with_a_copy_for_each_rank(server):
    body = {k: v for k, v in BODY.items() if k != "serialized_tensors"}
    assert server.post(ROUTE, body | {"serialized_named_tensors": [encoded(WEIGHTS)] * 2}).status == 200
    assert spooled(server) == ["1"]


def test_tensors_in_shared_memory(server):
    weights = {"x.lora_A.weight": torch.ones(2, 8)}
    with SharedAdapter(weights) as shared:
        assert server.post(ROUTE, shared.message("a", CONFIG, weight_version="9")).status == 200
        weights["x.lora_A.weight"] *= 2
        shared.write(weights)
        assert server.post(ROUTE, shared.message("b", CONFIG)).status == 200
    values = [load_file(server.spool.root / v / "adapter_model.safetensors")["x.lora_A.weight"] for v in "12"]
    assert [value.unique().tolist() for value in values] == [[1.0], [2.0]]
    assert [ref.weight_version for ref in server.registry.refs()] == ["9", None]


@pytest.mark.parametrize(("query", "field"), [("?inplace=1", {}), ("", {"upsert": True})])
def test_tensors_replace_a_loaded_adapter(server, query, field):
    server.post(ROUTE, BODY | {"pinned": True})
    assert "already loaded" in server.post(ROUTE, BODY).json()["error_message"]

    async def replace():
        assert (await server.send("POST", ROUTE + query, BODY | field)).status == 200
        while spooled(server) != ["2"]:
            await asyncio.sleep(0)
        assert server.client.unloaded == [1]

    run(replace())
    assert server.registry.refs()[0].pinned, "as the one that it replaces"


def test_files_go_with_the_unload(server):
    server.post(ROUTE, BODY)
    server.post(ROUTE, BODY | {"lora_name": "b"})
    assert spooled(server) == ["1", "2"]
    assert server.post("/unload_lora_adapter", {"lora_name": "a"}).json()["loaded_adapters"] == {"b": "__tensor__"}
    assert spooled(server) == ["2"]


def test_files_go_when_an_adapter_in_a_directory_takes_the_name(server):
    server.post(ROUTE, BODY)
    body = {"lora_name": "a", "lora_path": "/p/a", "load_inplace": True}

    async def replace():
        assert (await server.send("POST", "/v1/load_lora_adapter", body)).status == 200
        while spooled(server):
            await asyncio.sleep(0)
        assert server.client.unloaded == [1]

    run(replace())
    assert server.registry.loaded() == {"a": "/p/a"}


def test_a_load_that_fails_leaves_no_files_and_tells_nobody_where_they_were(server):
    root = server.spool.root
    server.client.load_errors = {str(root / "1"): AdapterInvalid(f"{root / '1'}: NaN")}
    answer = server.post(ROUTE, BODY)
    assert answer.status == 400
    assert answer.json()["error_message"] == "__tensor__: NaN"
    assert answer.json()["loaded_adapters"] == {}
    assert spooled(server) == []
    assert server.post(ROUTE, BODY).status == 200


DEEP = "in test_a_bad_body"
PICKLE = encoded(pickle.dumps({"x": 1}, protocol=4))
BAD = {
    "a pickle": ({"serialized_tensors": PICKLE}, "serialized_tensors: pickles are refused, they can run code"),
    "a pickle, old": ({"serialized_tensors": encoded(pickle.dumps({"x": 1}, 2))}, "pickles are refused"),
    "torch.save": ({"serialized_tensors": encoded(b"PK\x03\x04" + bytes(40))}, "pickles are refused"),
    "no safetensors": ({"serialized_tensors": encoded(b"hello world")}, "not a safetensors file"),
    "empty": ({"serialized_tensors": ""}, "not a safetensors file"),
    "not base64": ({"serialized_tensors": "§§§"}, "serialized_tensors: not base64"),
    "lines": ({"serialized_tensors": BODY["serialized_tensors"][:60] + "\n"}, "not base64"),
    "half a group": ({"serialized_tensors": BODY["serialized_tensors"][:61]}, "not base64"),
    "a list": ({"serialized_tensors": [BODY["serialized_tensors"]]}, "serialized_tensors"),
    "no weights": ({"serialized_tensors": None}, "exactly one of it and serialized_named_tensors"),
    "twice": ({"serialized_named_tensors": ["eHg="]}, "exactly one"),
    "no copies": ({"serialized_tensors": None, "serialized_named_tensors": []}, "equal copies"),
    "shards": ({"serialized_tensors": None, "serialized_named_tensors": ["eHg=", "eXk="]}, "equal copies"),
    "a pickle as a copy": (
        {"serialized_tensors": None, "serialized_named_tensors": [PICKLE]},
        "serialized_named_tensors: pickles are refused",
    ),
    "format": (
        {"load_format": "flattened_bucket"},
        "load_format: 'flattened_bucket': only 'safetensors' and 'shared_memory'",
    ),
    "memory of a GPU": ({"load_format": "cuda_ipc"}, "SharedAdapter does"),
    "tensors without the format": ({"tensors": []}, "tensors: only with load_format 'shared_memory'"),
    "shared memory without tensors": ({"load_format": "shared_memory", "serialized_tensors": None}, "tensors: "),
    "shared memory and text": (
        {"load_format": "shared_memory", "tensors": [{"name": "x", "dtype": "F32", "shape": [], "segment": "x"}]},
        "takes the weights from there alone",
    ),
    "shared memory that is not there": (
        {
            "load_format": "shared_memory",
            "serialized_tensors": None,
            "tensors": [{"name": "x", "dtype": "F32", "shape": [1], "segment": "multilora-not-there"}],
        },
        "segment 'multilora-not-there' does not exist",
    ),
    "config": ({"config_dict": "r"}, "config_dict"),
    "no config": ({"config_dict": None}, "config_dict"),
    "nested": ({"config_dict": DEEP}, "nested too deeply"),
    "added tokens": ({"added_tokens_config": {"x": 1}}, "added_tokens_config: not supported"),
    "name": ({"lora_name": "x:y"}, "':'"),
    "unknown field": ({"rank": 1}, "rank: not supported"),
}


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD)
def test_a_bad_body_is_400_and_leaves_nothing(server, change, said):
    text = json.dumps(BODY | change).replace(f'"{DEEP}"', '{"x":' * 3000 + "1" + "}" * 3000)
    answer = server.post(ROUTE, text.encode())
    assert answer.status == 400
    assert said in answer.json()["error_message"]
    assert server.client.loaded == {} and server.registry.loaded() == {}
    assert spooled(server) == []
    assert server.post(ROUTE, BODY).status == 200


def test_padding_in_the_middle(server, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", 32)
    text = encoded(WEIGHTS[:23]) + encoded(WEIGHTS[23:])
    answer = server.post(ROUTE, BODY | {"serialized_tensors": text})
    assert answer.status == 400
    assert "not base64" in answer.json()["error_message"]


@pytest.mark.parametrize("headers", [{}, {"content-length": "99999999999"}])
def test_a_body_over_the_bound(server, monkeypatch, headers):
    if not headers:
        monkeypatch.setattr(tensors.TensorsRoute, "max_body_bytes", 100)
    answer = server.post(ROUTE, BODY, **headers)
    assert answer.status == 413
    assert "load it by its path" in answer.json()["error_message"]
    assert list(answer.json()) == ["rid", "http_worker_ipc", "success", "error_message", "loaded_adapters"]


def test_a_taken_name_is_found_before_anything_is_written(server):
    server.load("a")
    assert "already loaded" in server.post(ROUTE, BODY).json()["error_message"]
    assert spooled(server) == []


def test_the_admin_key_guards_it():
    server = LocalServer(FakeEngineClient(), None, api_key="user", admin_api_key="admin")
    assert server.post(ROUTE, BODY, authorization="Bearer user").status == 401
    assert server.post(ROUTE, BODY, authorization="Bearer admin").status == 200
