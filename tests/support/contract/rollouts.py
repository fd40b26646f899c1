"""Reinforcement learning: what trainers call while they roll out on adapters that they replace at each step."""

import base64
import json
import threading
from pathlib import Path

from .table import Section
from .world import BASE, CHAT, COMPLETION, IDS, PATHS, TEXT, few

line = Section("rollouts", "Rollouts of trainers")

FRENCH = Path(PATHS["french"])
TENSORS = {
    "config_dict": json.loads((FRENCH / "adapter_config.json").read_text()),
    "serialized_tensors": base64.b64encode((FRENCH / "adapter_model.safetensors").read_bytes()).decode(),
}


@line
def trl(server):
    """TRL: pause, load the next version, resume, unload an old one; completions of ids with ids and logprobs."""
    server.load("name-v1", PATHS["french"])
    server.post("/pause?mode=keep")
    assert server.get("/is_paused").json() == {"is_paused": True}
    server.get("/health")
    server.post("/v1/load_lora_adapter", {"lora_name": "name-v2", "lora_path": PATHS["french"]})
    server.post("/resume")
    server.post("/v1/unload_lora_adapter", {"lora_name": "name-v1"})
    found = server.complete(model="name-v2", prompt=IDS, return_token_ids=True, logprobs=0)["choices"][0]
    assert len(found["token_ids"]) == len(found["logprobs"]["token_logprobs"]) == 2
    assert found["prompt_token_ids"] == IDS
    assert server.get("/get_world_size").json() == {"world_size": 1}
    server.post("/v1/unload_lora_adapter", {"lora_name": "name-v2"})


@line
def skyrl_tinker(server):
    """SkyRL's Tinker server: completions of ids with `n`, `seed`, logprobs, ids and the prompt's own logprobs."""
    wanted = {"n": 2, "seed": 3, "logprobs": True, "return_token_ids": True, "prompt_logprobs": 0}
    found = server.complete(model="sql", prompt=IDS, **wanted, temperature=1.0)["choices"]
    assert [choice["index"] for choice in found] == [0, 1]
    assert all(len(choice["token_ids"]) == 2 and choice["prompt_logprobs"][0] is None for choice in found)


@line
def generate_of_vllm(server):
    """SkyRL-train and prime-rl: `/inference/v1/generate` of token ids with vLLM's names, whole and streamed."""
    body = {"model": "sql", "token_ids": IDS, "cache_salt": "a", "priority": 0}
    body |= {"sampling_params": {"max_tokens": 2, "temperature": 0, "logprobs": 0}}
    [choice] = server.post("/inference/v1/generate", body).json()["choices"]
    assert choice["token_ids"] == server.native(lora_path="sql")["output_ids"]
    assert len(choice["logprobs"]["content"]) == 2
    chunks = server.events("/inference/v1/generate", body)
    ids = [token for chunk in chunks for one in chunk["choices"] for token in one["token_ids"]]
    assert ids == choice["token_ids"]


@line
def loads_in_place(server):
    """prime-rl: the same name at each step, in place by `upsert` or `?inplace=1`; each load is a new version."""
    versions = []
    body = {"lora_name": "policy", "lora_path": PATHS["french"]}
    for path, more in (("/load_lora_adapter", {"upsert": True}), ("/load_lora_adapter?inplace=1", {})) * 2:
        server.post(path, body | more)
        versions.append(server.native({"max_new_tokens": 1}, lora_path="policy")["meta_info"]["lora_version"])
    assert versions == sorted(set(versions))
    server.failed("/load_lora_adapter", body, "already loaded")
    server.unload("policy")


@line
def generate_of_sglang(server):
    """miles and slime: `/generate` of ids with logprobs, `lora_path`, `rid` and `extra_key`."""
    wanted = {"return_logprob": True, "lora_path": "sql", "rid": "r1", "extra_key": "k"}
    meta = server.native(input_ids=IDS, **wanted)["meta_info"]
    assert meta["id"] == "r1"
    assert len(meta["output_token_logprobs"]) == 2
    [load] = server.get("/v1/loads").json()["loads"]
    assert load["num_running_reqs"] >= 0
    server.post("/flush_cache")


@line
def tensors_in_place(server):
    """miles and slime: `/load_lora_adapter_from_tensors` with `upsert` and a `weight_version` of the caller's."""
    for step in ("7", "8"):
        body = TENSORS | {"lora_name": "policy", "upsert": True, "weight_version": step}
        server.post("/load_lora_adapter_from_tensors", body)
        meta = server.native({"max_new_tokens": 1}, lora_path="policy")["meta_info"]
        assert meta["weight_version"] == step
    server.unload("policy")


@line
def pauses_of_sglang(server):
    """`/pause_generation` holds requests until `/continue_generation`, in each of its modes."""
    for mode in ("in_place", "retract", "abort"):
        server.post("/pause_generation", {"mode": mode})
        found = []
        thread = threading.Thread(target=lambda into=found: into.append(server.native()))
        thread.start()
        assert server.get("/is_paused").json() == {"is_paused": True}
        assert found == []
        server.post("/continue_generation", {})
        thread.join()
        assert len(found[0]["output_ids"]) == 2
    server.refused("/pause_generation", {"mode": "nap"}, "mode")


@line
def sleep(server):
    """`/sleep` releases the device's memory, requests are 503; `/wake_up` brings adapters back as they were."""
    before = server.native(lora_path="pirate")["output_ids"]
    server.post("/sleep?level=1")
    assert server.get("/is_sleeping").json() == {"is_sleeping": True}
    answer = server.post("/generate", {"text": TEXT, "sampling_params": few()}, 503)
    assert answer.headers["retry-after"]
    server.post("/wake_up")
    assert server.get("/is_sleeping").json() == {"is_sleeping": False}
    assert server.native(lora_path="pirate")["output_ids"] == before


@line
def memory_occupation(server):
    """`/release_memory_occupation` and `/resume_memory_occupation` do the same in SGLang's way."""
    before = server.native(lora_path="sql")["output_ids"]
    server.post("/release_memory_occupation", {})
    assert server.get("/is_sleeping").json() == {"is_sleeping": True}
    server.post("/resume_memory_occupation", {})
    assert server.native(lora_path="sql")["output_ids"] == before


@line
def versions(server):
    """Every answer says which adapter version made it, and its `weight_version`: the caller's, else the server's."""
    with server.loaded("policy", weight_version="step-3"):
        number = server.get("/v1/models/policy").json()["version"]
        expected = {"weight_version": "step-3", "lora_version": number}
        assert server.complete(model="policy")["metadata"] == expected
        assert server.chat(model=f"{BASE}:policy")["metadata"] == expected
        meta = server.native(lora_path="policy")["meta_info"]
        assert {name: meta[name] for name in expected} == expected
        for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
            assert server.events(path, body | {"model": "policy"})[-1]["metadata"] == expected
    assert server.complete()["metadata"] == {"weight_version": "default", "lora_version": None}


@line
def pickles(server):
    """A pickle is refused, by name; safetensors, as bytes or in shared memory, take its place."""
    body = TENSORS | {"lora_name": "policy", "load_format": "flattened_bucket"}
    server.failed("/load_lora_adapter_from_tensors", body, "load_format")
    pickled = base64.b64encode(b"\x80\x04N.").decode()
    body = TENSORS | {"lora_name": "policy", "serialized_tensors": pickled}
    server.failed("/load_lora_adapter_from_tensors", body, "pickle")


line.elsewhere(
    "shared-memory",
    "A trainer on the same machine gives the tensors in shared memory.",
    "tests/server/test_tensors.py::test_tensors_in_shared_memory",
)


@line.deviates
def cuda_ipc(server):
    """A trainer on the same machine gives CUDA IPC handles of the tensors."""
    body = {"lora_name": "policy", "config_dict": TENSORS["config_dict"], "load_format": "cuda_ipc", "tensors": []}
    server.failed("/load_lora_adapter_from_tensors", body, "load_format", "cuda_ipc")
