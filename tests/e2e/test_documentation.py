"""The LoRA-serving documentation, end to end: real server, real HTTP, the bundled model and its adapters."""

import base64
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from running_server import ANSWERS, GREEDY, PATHS, PROMPT, Server, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """Started with one adapter; the tests leave it as they found it."""
    with serving(tmp_path_factory, "--lora-paths", f"pirate={PATHS['pirate']}") as running:
        yield running


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Iterator[Server]:
    """Three adapters, room for two."""
    paths = [f"{name}={PATHS[name]}" for name in ("pirate", "sql", "json")]
    with serving(tmp_path_factory, "--lora-paths", *paths, "--max-loras-per-batch", "2") as running:
        yield running


def test_single_adapter(server):
    response = server.generate([PROMPT, PROMPT], ["pirate", None])
    assert response.status_code == 200
    assert [item["text"].strip() for item in response.json()] == [ANSWERS["pirate"], ANSWERS[None]]
    assert response.json()[0]["meta_info"]["finish_reason"]["type"] == "stop"


def test_several_adapters_and_base_in_one_batch(server):
    for name in ("sql", "json", "french"):
        assert server.load(name).status_code == 200
    names = [None, "pirate", "sql", "json", "french", "pirate", None]
    response = server.generate([PROMPT] * len(names), names)
    assert [item["text"].strip() for item in response.json()] == [ANSWERS[name] for name in names]
    for name in ("sql", "json", "french"):
        assert server.unload(name).status_code == 200


def test_dynamic_load_unload_and_replace_under_the_same_name(server):
    loaded = server.load("style", PATHS["sql"])
    assert loaded.status_code == 200
    assert list(loaded.json()) == ["rid", "http_worker_ipc", "success", "error_message", "loaded_adapters"]
    assert loaded.json()["loaded_adapters"] == {"pirate": PATHS["pirate"], "style": PATHS["sql"]}
    assert server.answer("style") == ANSWERS["sql"]
    again = server.load("style", PATHS["json"])
    assert again.status_code == 400
    assert "already loaded" in again.json()["error_message"]
    assert server.answer("style") == ANSWERS["sql"], "a refused load changed something"
    assert server.unload("style").status_code == 200
    gone = server.generate(PROMPT, "style")
    assert gone.status_code == 400
    assert "never been loaded" in gone.text
    assert "style" in gone.text
    assert server.load("style", PATHS["json"]).status_code == 200
    assert server.answer("style") == ANSWERS["json"], "stale weights or a stale prefix cache"
    assert server.unload("style").status_code == 200
    assert "does not exist" in server.unload("style").json()["error_message"]


def test_swap_in_place_while_requests_run(server):
    """vLLM's route: a new version at once, requests in flight finish on the old one."""
    body = {"lora_name": "swap", "lora_path": PATHS["sql"]}
    assert server.http.post("/v1/load_lora_adapter", json=body).status_code == 200
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(server.answer, "swap") for _ in range(8)]
        body |= {"lora_path": PATHS["french"], "load_inplace": True}
        assert server.http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert server.answer("swap") == ANSWERS["french"]
        assert {f.result() for f in running} <= {ANSWERS["sql"], ANSWERS["french"]}
    assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "swap"}).status_code == 200


def test_load_and_unload_while_requests_run(server):
    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(server.answer, "pirate") for _ in range(12)]
        for _ in range(3):
            assert server.load("json").status_code == 200
            assert server.answer("json") == ANSWERS["json"]
            assert server.unload("json").status_code == 200
        assert {f.result() for f in running} == {ANSWERS["pirate"]}


def test_three_adapters_with_room_for_two(narrow):
    names = ["pirate", "sql", "json", None] * 4
    response = narrow.generate([PROMPT] * len(names), names)
    assert response.status_code == 200, response.text
    assert [item["text"].strip() for item in response.json()] == [ANSWERS[name] for name in names]
    time.sleep(0.2)
    assert narrow.metric("sglang:lora_pool_slots_total") == 2
    assert narrow.metric("sglang:lora_pool_slots_used") <= 2


def test_pinning(narrow):
    assert narrow.load("french", pinned=True).status_code == 200
    starving = narrow.load("second", PATHS["sql"], pinned=True)
    assert starving.status_code == 400
    assert "starvation" in starving.json()["error_message"]
    for name in ("pirate", "sql", "json", "french", "pirate"):
        assert narrow.answer(name) == ANSWERS[name]
    assert narrow.unload("french").status_code == 200


def test_openai_client_package(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    base = client.models.list().data[0].id
    for model, name in ((f"{base}:pirate", "pirate"), ("pirate", "pirate"), (base, None), (f"{base}:", None)):
        done = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=64)
        assert done.choices[0].text.strip() == ANSWERS[name]
        assert done.choices[0].finish_reason == "stop"
        assert done.model == model
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = client.chat.completions.create(model=f"{base}:pirate", messages=question, temperature=0, max_tokens=64)
    assert "Arr" in chat.choices[0].message.content
    assert chat.usage.completion_tokens > 0
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.completions.create(model="nope", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="never been loaded"):
        client.completions.create(model=f"{base}:nope", prompt=PROMPT)


def test_an_adapter_from_tensors(server):
    """The real files, sent instead of named; the OpenAI client asks it."""
    folder = Path(PATHS["sql"])
    body = {
        "lora_name": "fresh",
        "config_dict": json.loads((folder / "adapter_config.json").read_text()),
        "serialized_tensors": base64.b64encode((folder / "adapter_model.safetensors").read_bytes()).decode(),
    }
    response = server.http.post("/load_lora_adapter_from_tensors", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["loaded_adapters"]["fresh"] == "__tensor__"
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    done = client.completions.create(model="fresh", prompt=PROMPT, temperature=0, max_tokens=64)
    assert done.choices[0].text.strip() == ANSWERS["sql"]
    assert server.unload("fresh").status_code == 200
    body["config_dict"]["r"] += 1
    response = server.http.post("/load_lora_adapter_from_tensors", json=body)
    assert response.status_code == 400
    assert "adapter_config.json" in response.json()["error_message"]


def test_streams_agree_with_the_whole_answer(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="pirate", prompt=PROMPT, temperature=0, max_tokens=64, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream).strip() == ANSWERS["pirate"]
    body = {"text": PROMPT, "sampling_params": GREEDY, "lora_path": "pirate", "stream": True}
    with server.http.stream("POST", "/generate", json=body) as response:
        frames = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert frames[-1] == "[DONE]"
    texts = [json.loads(frame)["text"] for frame in frames[:-1]]
    assert texts[-1].strip() == ANSWERS["pirate"]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts)), "not cumulative"


def test_json_schema_holds_the_model_to_it(server):
    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    response = server.generate(
        PROMPT, sampling_params={"json_schema": schema, "max_new_tokens": 40, "temperature": 0}
    )
    assert response.status_code == 200, response.text
    item = response.json()
    if item["meta_info"]["finish_reason"]["type"] == "stop":
        assert set(json.loads(item["text"])) >= {"n"}
    else:
        assert item["text"].lstrip().startswith("{")


def test_bad_adapters_change_nothing(server, tmp_path):
    before = server.http.get("/v1/models").json()
    missing = server.load("x", str(tmp_path / "missing"))
    assert missing.status_code == 400
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text(Path(PATHS["sql"], "adapter_config.json").read_text())
    weights = Path(PATHS["sql"], "adapter_model.safetensors").read_bytes()
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    broken = server.load("x", str(tmp_path / "broken"))
    assert broken.status_code == 400
    assert "adapter_model.safetensors" in broken.json()["error_message"]
    assert broken.json()["loaded_adapters"] == {"pirate": PATHS["pirate"]}
    after = server.http.get("/v1/models").json()
    assert [m["id"] for m in after["data"]] == [m["id"] for m in before["data"]]
    assert server.answer("pirate") == ANSWERS["pirate"]


def test_a_hang_up_aborts(server):
    """A client that goes away takes its request along: it ends before it has all of its tokens."""
    wanted, before = 1500, server.metric("vllm:iteration_tokens_total_sum")  # what the engine has computed
    body = {"text": PROMPT, "sampling_params": {"max_new_tokens": wanted, "ignore_eos": True}, "stream": True}
    with server.http.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()  # kept: its end closes the connection
        next(lines)
        until(lambda: server.metric("vllm:num_requests_running") == 1)  # else a 0 could be that of before
    until(lambda: server.metric("vllm:num_requests_running") == 0)
    assert server.metric("vllm:iteration_tokens_total_sum") - before < wanted


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_drains(tmp_path_factory):
    with serving(tmp_path_factory, "--lora-paths", f"sql={PATHS['sql']}") as server, ThreadPoolExecutor(1) as thread:
        running = thread.submit(server.generate, PROMPT, "sql")
        time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert running.result().json()["text"].strip() == ANSWERS["sql"]
        assert server.process.wait(30) == 0


def test_a_dead_engine_that_is_not_started_again_is_noticed_at_once(tmp_path_factory):
    server = Server("--max-engine-restarts", "0", log=tmp_path_factory.mktemp("server") / "log")
    try:
        engine = next(
            p for p in psutil.Process(server.process.pid).children() if "engine.process.worker" in str(p.cmdline())
        )
        with ThreadPoolExecutor(1) as thread:
            sampling = {"max_new_tokens": 2000, "ignore_eos": True}
            waiting = thread.submit(server.generate, PROMPT, None, sampling_params=sampling)
            time.sleep(0.3)
            os.kill(engine.pid, signal.SIGKILL)
            answer = waiting.result(timeout=10)
        assert answer.status_code == 503
        assert "engine" in answer.text
        assert server.http.get("/health").status_code == 503
        assert server.generate(PROMPT).status_code == 503
    finally:
        server.http.close()
        server.process.kill()
        server.process.wait()
