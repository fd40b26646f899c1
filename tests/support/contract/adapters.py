"""Loading, unloading, names and lists of adapters, in SGLang's and in vLLM's way."""

import base64
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from .table import Section
from .world import ADAPTER_RESULT, BASE, LOADED, PATHS, TEXT, few

line = Section("adapters", "Adapters")

LOAD, UNLOAD = "/load_lora_adapter", "/unload_lora_adapter"
V1_LOAD, V1_UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def version_of(server, name: str) -> int:
    return int(server.get(f"/v1/models/{name}").json()["version"])


@contextmanager
def unloading(server, name: str):
    """An unload that waits for the adapter's one running request, which ends with the context."""
    body = {"text": TEXT, "rid": "held", "lora_path": name}
    answers = []
    unload = threading.Thread(target=lambda: answers.append(server.unload(name)))
    assert server.load(name, PATHS["french"]).status_code == 200
    endless = {"sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
    with server.streaming("/generate", body | endless) as response:
        events = response.iter_lines()  # to let go of it would hang up
        next(events)
        unload.start()
        while server.post("/generate", body | {"rid": "new", "sampling_params": few()}, None).status_code == 200:
            time.sleep(0.01)
        yield answers
        server.post("/abort_request", {"rid": "held"})
        unload.join()


@line
def loading(server):
    """`/load_lora_adapter` answers 200 with SGLang's keys in SGLang's order, and every loaded adapter's path."""
    answer = server.post(LOAD, {"lora_name": "new", "lora_path": PATHS["french"], "pinned": False}).json()
    paths = LOADED | {"new": PATHS["french"]}
    expected = [None, None, True, "", paths]
    assert list(answer.items()) == list(zip(ADAPTER_RESULT, expected, strict=True))
    assert server.native(lora_path="new")["meta_info"]["lora_version"] == version_of(server, "new")
    answer = server.post(UNLOAD, {"lora_name": "new"}).json()
    assert list(answer.items()) == list(zip(ADAPTER_RESULT, [None, None, True, "", LOADED], strict=True))


@line
def failed_loads(server, tmp_path):
    """A load that fails is 400 in the same shape: the name is taken, no such path, no field, no valid adapter."""
    server.failed(LOAD, {"lora_name": "pirate", "lora_path": PATHS["sql"]}, "'pirate'", "already loaded")
    server.failed(LOAD, {"lora_name": "new", "lora_path": "/no/such"}, "/no/such", "does not exist")
    server.failed(LOAD, {"lora_name": "new"}, "lora_path", "required")
    server.failed(LOAD, {"lora_path": "/a"}, "lora_name", "required")
    (tmp_path / "adapter_config.json").write_bytes(Path(PATHS["sql"], "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not this")
    server.failed(LOAD, {"lora_name": "new", "lora_path": str(tmp_path)}, "adapter_model.safetensors")


@line
def starvation(server):
    """To pin the last free place is 400 with "starvation"."""
    with server.loaded("first", pinned=True):
        body = {"lora_name": "second", "lora_path": PATHS["sql"], "pinned": True}
        server.failed(LOAD, body, "starvation")


@line
def unloading_waits(server):
    """An unload waits for its adapter's running requests, new ones are 400, so is a load; nothing else waits."""
    with unloading(server, "leaving") as answers:
        body = {"text": TEXT, "lora_path": "leaving"}
        server.refused("/generate", body, "'leaving'", "unloaded")
        server.failed(LOAD, {"lora_name": "leaving", "lora_path": PATHS["sql"]}, "being unloaded")
        assert server.native(lora_path="pirate")["meta_info"]["lora_version"] == 1
        assert answers == []
    assert answers[0].status_code == 200
    assert answers[0].json()["loaded_adapters"] == LOADED


line.elsewhere(
    "a-hang-up-undoes-nothing",
    "An unload goes on when its client hangs up.",
    "tests/server/test_adapters.py::test_an_unload_goes_on_when_its_client_hangs_up",
)


@line
def unloaded_is_gone(server):
    """An unloaded name is gone: 400 "never been loaded, or was unloaded", and it can be loaded again."""
    for _ in range(2):
        assert server.load("again", PATHS["french"]).status_code == 200
        assert server.unload("again").status_code == 200
        server.refused("/generate", {"text": TEXT, "lora_path": "again"}, "'again'", "never been loaded", "unloaded")


@line
def unknown_unloads(server):
    """An unload of an unknown name is 400 with "does not exist"."""
    server.failed(UNLOAD, {"lora_name": "nope"}, "'nope'", "does not exist")


@line
def evicted_adapters(server):
    """An adapter that was merely evicted stays listed and comes back by itself."""
    versions = {"pirate": 1, "sql": 2}
    with server.loaded("third"), server.loaded("fourth"):
        for name in ("third", "fourth"):
            server.native({"max_new_tokens": 1}, lora_path=name)
        assert set(server.loaded_adapters()) == {*versions, "third", "fourth"}
        for name, version in versions.items():
            found = server.native({"max_new_tokens": 1}, lora_path=name)
            assert found["meta_info"]["lora_version"] == version


@line
def names(server):
    """A name has 1 to 256 characters, no `:`, may hold `/`, and is not the served model's."""
    for name in ("", "a" * 257, "a:b", BASE, "default"):
        server.failed(LOAD, {"lora_name": name, "lora_path": PATHS["french"]}, "name")
    for name in ("a" * 256, "org/name", PATHS["french"]):
        with server.loaded(name):
            assert server.complete(model=f"{BASE}:{name}", max_tokens=1)["metadata"]["lora_version"]


@line
def from_tensors(server):
    """`/load_lora_adapter_from_tensors` takes the weights in the request; the adapter's root is `__tensor__`."""
    folder = Path(PATHS["french"])
    body = {
        "lora_name": "fresh",
        "config_dict": json.loads((folder / "adapter_config.json").read_text()),
        "serialized_tensors": base64.b64encode((folder / "adapter_model.safetensors").read_bytes()).decode(),
    }
    answer = server.post("/load_lora_adapter_from_tensors", body).json()
    assert list(answer) == ADAPTER_RESULT
    assert answer["loaded_adapters"]["fresh"] == "__tensor__"
    assert server.get("/v1/models/fresh").json()["root"] == "__tensor__"
    fresh = server.native(lora_path="fresh")["output_ids"]
    with server.loaded("same"):
        assert fresh == server.native(lora_path="same")["output_ids"]
    assert server.unload("fresh").status_code == 200


@line
def models(server):
    """`/v1/models` lists base first (`parent` null), then adapters with path and parent; each by name, too."""
    found = server.get("/v1/models").json()["data"]
    assert [(m["id"], m["parent"]) for m in found] == [(BASE, None), ("pirate", BASE), ("sql", BASE)]
    assert [m["root"] for m in found[1:]] == [PATHS["pirate"], PATHS["sql"]]
    for model in found:
        assert server.get(f"/v1/models/{model['id']}").json() == model
    server.get("/v1/models/nope", 404)


@line
def vllm_loads(server, tmp_path):
    """vLLM's load is 200 with a text; a taken name is 400 "already been loaded", no such path 404, a bad one 400."""
    body = {"lora_name": "new", "lora_path": PATHS["french"]}
    assert "'new'" in server.post(V1_LOAD, body).text
    server.refused(V1_LOAD, body, "'new'", "already been loaded", "load_inplace")
    server.refused(V1_LOAD, {"lora_name": "other", "lora_path": "/no/such"}, "/no/such", status=404)
    for file in Path(PATHS["french"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:300])
    server.refused(V1_LOAD, {"lora_name": "other", "lora_path": str(tmp_path)}, "adapter_config.json")
    assert "'new'" in server.post(V1_UNLOAD, {"lora_name": "new"}).text
    server.refused(V1_UNLOAD, {"lora_name": "new"}, "'new'", status=404)


@line
def swaps_in_place(server):
    """`load_inplace` swaps: the same prompt is computed anew by the new weights, under the old name."""
    prompt = [7 + i % 90 for i in range(40)]

    def computed() -> tuple[list[int], int]:
        found = server.native(input_ids=prompt, lora_path="swap")
        return found["output_ids"], found["meta_info"]["cached_tokens"]

    with server.loaded("swap", PATHS["sql"]), server.loaded("french"):
        computed()
        assert computed()[1] == 32
        server.post(V1_LOAD, {"lora_name": "swap", "lora_path": PATHS["french"], "load_inplace": True})
        ids, cached = computed()
        assert cached == 0, "a stale prefix"
        assert ids == server.native(input_ids=prompt, lora_path="french")["output_ids"]


@line
def unloads_free_memory(server):
    """An unload frees the adapter's memory, on the device and on the host."""

    def held() -> set[int]:
        state = server.get("/server_info").json()["internal_states"][0]
        return {one["version"] for one in state["adapters"]}

    with server.loaded("short"):
        server.native(lora_path="short")
        version = version_of(server, "short")
        deadline = time.monotonic() + 10
        while version not in held():
            assert time.monotonic() < deadline
    while version in held():
        assert time.monotonic() < deadline
    assert 'adapter_name="short"' not in server.get("/metrics").text


@line
def which_adapter(server):
    """An adapter is chosen by `base:adapter`, by `lora_path`, or by `model: adapter`; `base:` and base are none."""
    chosen = [
        ({"model": f"{BASE}:pirate"}, 1),
        ({"model": "sql"}, 2),
        ({"model": BASE, "lora_path": "sql"}, 2),
        ({"model": f"{BASE}:"}, None),
        ({"model": BASE}, None),
        ({"model": "default"}, None),
        ({"model": None}, None),
    ]
    for body, version in chosen:
        found = server.complete(**body, max_tokens=1)
        assert found["metadata"]["lora_version"] == version, body
        assert found["model"] == (body["model"] or BASE), "not echoed as sent"
    assert server.chat(model="pirate", max_tokens=1)["metadata"]["lora_version"] == 1


@line
def unknown_models(server):
    """`base:nope` is 400, `nope` and another base's name are 404: an unknown name is never served by base."""
    for path, body in (("/v1/completions", {"prompt": TEXT}), ("/v1/chat/completions", {"messages": []})):
        if "messages" in body:
            body["messages"].append({"role": "user", "content": "Hi"})
        server.refused(path, body | {"model": f"{BASE}:nope"}, "'nope'", "never been loaded")
        for name in ("nope", "other:pirate", "Pirate"):
            error = server.refused(path, body | {"model": name}, f"'{name}'", status=404)
            assert (error["code"], error["param"]) == ("model_not_found", "model")
