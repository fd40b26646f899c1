"""TRL's AsyncGRPO client: what its trainer does around every new policy, through its own VLLMClient."""

import os
import shutil
import tempfile
from pathlib import Path

import requests
from accelerate import PartialState
from checks import ADAPTER, ANSWERS, PROMPT, URL, V1, check, main, same
from trl.experimental.async_grpo.vllm_client import VLLMClient

PartialState()  # TRL's logger asks for it
client = VLLMClient(URL)
SAVED = Path(os.environ["MULTILORA_ADAPTERS"]) / ADAPTER
PLAN = {"max_staleness": 1, "rank": 64}


@check("readiness and introspection")
def readiness():
    client.wait_for_server_ready()
    lora = client.get_server_info()["lora_config"]
    assert lora["max_lora_rank"] >= PLAN["rank"] and lora["max_loras"] >= PLAN["max_staleness"] + 2, lora
    same(client.get_server_info()["parallel_config"]["data_parallel_size"], 1)
    same(client.get_world_size(), 1)
    return f"{client.get_max_model_len()} tokens, {client.get_dtype()}, {lora}"


@check("three policies: pause, load, resume, roll out, unload")
def policies():
    folder = Path(tempfile.mkdtemp())
    ids = requests.post(f"{URL}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    for version in range(3):
        path = folder / f"trl-policy-v{version}"
        shutil.copytree(SAVED, path)
        client.pause()
        client.load_lora_adapter(path.name, str(path))
        client.resume()
        body = {
            "model": path.name,
            "prompt": ids,
            "max_tokens": 64,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "n": 1,
        }
        body |= {"repetition_penalty": 1.0, "return_token_ids": True, "logprobs": 0, "seed": 2**62 + version}
        found = requests.post(f"{V1}/completions", json=body)
        found.raise_for_status()
        (choice,) = found.json()["choices"]
        same(choice["text"], ANSWERS[ADAPTER])
        same(len(choice["token_ids"]), len(choice["logprobs"]["token_logprobs"]))
        if version > PLAN["max_staleness"]:
            stale = folder / f"trl-policy-v{version - PLAN['max_staleness'] - 1}"
            client.unload_lora_adapter(stale.name)
            shutil.rmtree(stale)
    names = [card["id"] for card in requests.get(f"{V1}/models").json()["data"]]
    same([name for name in names if name.startswith("trl-")], ["trl-policy-v1", "trl-policy-v2"])
    for name in ("trl-policy-v1", "trl-policy-v2"):
        client.unload_lora_adapter(name)
    return choice["logprobs"]["token_logprobs"][:3]


main()
