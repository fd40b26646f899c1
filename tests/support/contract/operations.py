"""What probes, boards, tools and operators read: routes about the server, and /metrics."""

import time

from prometheus_client.parser import text_string_to_metric_families

from multilora.server.access_rules import RULES, Need

from .table import Section
from .world import BASE, LOADED, PAGE_ORIGIN, TEXT, few, local

line = Section("operations", "Routes about the server, and metrics")

ADMIN_PATHS = [path for path, rule in RULES.items() if rule.need in (Need.ADMIN, Need.LOADS, Need.ABORTS)]
PER_ADAPTER = """requests prompt_tokens generation_tokens time_to_first_token_seconds request_queue_time_seconds
    inter_token_latency_seconds adapter_loads adapter_evictions adapter_load_seconds adapter_bytes adapter_hits
    adapter_misses"""


def samples(server) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Name of a sample → labels and value."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@line
def probes(server):
    """`/health`, `/health_generate`, `/ready` and `/ping` are 200 while the engine lives, `/ping` by POST too."""
    for path in ("/health", "/health_generate", "/ready", "/ping"):
        server.get(path)
    server.post("/ping")


@line
def head(server):
    """HEAD answers wherever GET does, without a body."""
    for path in ("/health", "/v1/models", "/metrics", "/"):
        answer = server.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


@line
def model_info(server):
    """`/model_info` and `/get_model_info` describe the base model."""
    found = server.get("/model_info").json()
    assert found == server.get("/get_model_info").json()
    assert {"model_path", "tokenizer_path", "is_generation", "weight_version"} <= set(found)


@line
def server_info(server):
    """`/server_info` and `/get_server_info` have the arguments, the version and the adapters; no path is null."""
    found = server.get("/server_info").json()
    assert set(found) == set(server.get("/get_server_info").json())
    assert (found["max_loras_per_batch"], found["version"]) == (2, server.get("/version").json()["version"])
    assert {one["lora_name"]: one["lora_path"] for one in found["loaded_adapters"]} == LOADED
    assert found["model_path"]
    assert found["tokenizer_path"]


@line
def internal_states(server):
    """`/server_info` has `internal_states`, in which SGLang's benchmarks read throughput and room."""
    [state] = server.get("/server_info").json()["internal_states"]
    assert {"effective_max_running_requests_per_dp", "last_gen_throughput"} <= set(state)


@line
def flushing(server):
    """`/flush_cache`, by GET and POST, and vLLM's `/reset_prefix_cache` empty the prefix cache."""
    prompt = [9 + i % 70 for i in range(40)]

    def cached() -> int:
        return int(server.native({"max_new_tokens": 1}, input_ids=prompt)["meta_info"]["cached_tokens"])

    cached()
    for flush in (lambda: server.get("/flush_cache"), lambda: server.post("/flush_cache")):
        flush()
        assert (cached(), cached()) == (0, 32)
    server.post("/reset_prefix_cache")
    assert cached() == 0


@line
def load(server):
    """`/v1/loads` is SGLang's, `/load` vLLM's; `/get_world_size` and `/version` are vLLM's."""
    [found] = server.get("/v1/loads").json()["loads"]
    assert {"num_running_reqs", "num_waiting_reqs", "token_usage", "gen_throughput"} <= set(found)
    assert server.get("/load").json() == {"server_load": 0}
    assert server.get("/get_world_size").json() == {"world_size": 1}
    assert set(server.get("/version").json()) == {"version"}


line.elsewhere(
    "profiles",
    "`/start_profile` and `/stop_profile` record what the engine does.",
    "tests/server/test_profiling.py::test_the_body_of_sglang",
)


@line
def tokenize(server):
    """`/tokenize` and `/detokenize`, also below `/v1`, answer in both dialects; `/tokenizer_info` is there."""
    for prefix in ("", "/v1"):
        found = server.post(f"{prefix}/tokenize", {"model": BASE, "prompt": TEXT}).json()
        assert (found["tokens"], found["count"], found["max_model_len"]) == ([1, 55, 32, 435], 4, 2048)
        found = server.post(f"{prefix}/detokenize", {"model": BASE, "tokens": found["tokens"]}).json()
        assert found == {"text": TEXT, "prompt": f"<|bos|>{TEXT}"}
    assert server.get("/tokenizer_info").json()["bos_token"] == "<|bos|>"


@line
def responses(server):
    """`/v1/responses` makes a response, which can be read again, and cancelled while it runs."""
    found = server.post("/v1/responses", {"input": "Hi", "max_output_tokens": 1}).json()
    assert (found["object"], found["status"]) == ("response", "incomplete")
    assert server.get(f"/v1/responses/{found['id']}").json() == found
    body = {"input": "Hi", "max_output_tokens": 1500, "background": True}
    started = server.post("/v1/responses", body).json()["id"]
    assert server.post(f"/v1/responses/{started}/cancel").json()["status"] in ("cancelled", "completed")


@line
def messages(server):
    """`/v1/messages` is Anthropic's, with `/v1/messages/count_tokens`."""
    body = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}
    found = server.post("/v1/messages", body | {"max_tokens": 1}).json()
    assert (found["type"], found["role"], found["stop_reason"]) == ("message", "assistant", "max_tokens")
    counted = server.post("/v1/messages/count_tokens", body).json()
    assert counted == {"input_tokens": found["usage"]["input_tokens"]}


@line
def embeddings(server):
    """`/v1/embeddings` is OpenAI's and `/encode` SGLang's, with adapters."""
    found = server.post("/v1/embeddings", {"model": "pirate", "input": ["Hi", "Ho"], "dimensions": 8}).json()
    assert (found["object"], found["model"], len(found["data"])) == ("list", "pirate", 2)
    assert [len(item["embedding"]) for item in found["data"]] == [8, 8]
    assert set(server.post("/encode", {"text": "Hi", "lora_path": "pirate"}).json()) == {"embedding", "meta_info"}


@line
def classification(server):
    """`/classify` and `/v1/classify` need a classification head, of base or adapter; without one they say so."""
    for path in ("/classify", "/v1/classify"):
        server.refused(path, {"model": "pirate", "input": "Hi"}, "classification head")


@line
def scores(server):
    """`/v1/score`, `/score`, `/v1/rerank`, `/v2/rerank` and `/rerank` are vLLM's, with adapters."""
    for path in ("/v1/score", "/score"):
        found = server.post(path, {"model": "pirate", "text_1": "Hi", "text_2": ["Hi", "Ho"]}).json()
        assert (found["data"][0]["object"], len(found["data"])) == ("score", 2)
        assert abs(found["data"][0]["score"] - 1) < 1e-5
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        found = server.post(path, {"query": "Hi", "documents": ["Ho", "Hi"], "top_n": 1}).json()
        assert [(item["index"], item["document"]) for item in found["results"]] == [(1, {"text": "Hi"})]


@line.deviates
def sglangs_scores(server):
    """SGLang's `/v1/score` gives probabilities of `label_token_ids`, its `/v1/rerank` a bare list of scores."""
    server.refused("/v1/score", {"query": "Hi", "items": ["Ho"], "label_token_ids": [3]}, "query")
    assert set(server.post("/v1/rerank", {"query": "Hi", "documents": ["Ho"]}).json()) >= {"results", "usage"}


@line
def open_paths():
    """`/health*`, `/ready*` and `/metrics` need no key; `--metrics-key` closes `/metrics`."""
    s = local(api_key="k", admin_api_key="a")
    for path in ("/health", "/health_generate", "/ready", "/metrics"):
        assert s.get(path).status == 200
    assert s.get("/v1/models").status == 401
    assert s.get("/v1/models", authorization="Bearer k").status == 200
    assert local(metrics_key="m").get("/metrics").status == 401
    assert local(metrics_key="m").get("/metrics", authorization="Bearer m").status == 200


@line
def admin_key():
    """`--admin-api-key` alone opens what changes the server."""
    s = local(api_key="k", admin_api_key="a")
    for path in sorted(ADMIN_PATHS):
        assert s.post(path, {}, authorization="Bearer k").status == 401, path
    assert s.post("/flush_cache", authorization="Bearer a").status == 200


@line
def origins(server):
    """`--cors-origins` lets pages of these origins call, preflight included."""
    asked = {"origin": PAGE_ORIGIN, "access-control-request-method": "POST"}
    answer = server.http.options("/generate", headers=asked)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE_ORIGIN)
    assert server.get("/health", origin=PAGE_ORIGIN).headers["access-control-allow-origin"] == PAGE_ORIGIN
    assert "access-control-allow-origin" not in server.get("/health", origin="https://other.example").headers


@line.deviates
def origins_without_a_flag():
    """Without a flag pages of every origin may call, as with SGLang (with vLLM none may)."""
    assert "access-control-allow-origin" not in local().get("/health", origin=PAGE_ORIGIN).headers


@line
def lora_pool(server):
    """`sglang:lora_pool_slots_used`, `_total` (the limit if set) and `lora_pool_utilization` are gauges."""
    server.native(text=[TEXT] * 2, lora_path=["pirate", "sql"])
    deadline = time.monotonic() + 10
    while server.metric("sglang:lora_pool_slots_used") != 2:
        assert time.monotonic() < deadline
    assert server.metric("sglang:lora_pool_slots_total") == 2
    assert server.metric("sglang:lora_pool_utilization") == 1


line.elsewhere(
    "lora-pool-without-a-limit",
    "Without a limit the total is how many adapters of the loaded ones' mean size the arena could hold.",
    "tests/adapters/lifecycle/test_store.py::test_slots",
)


@line
def routing_by_adapter(server):
    """`vllm:lora_requests_info` names running and waiting adapters, with the limit; its value is a time."""
    body = {"text": TEXT, "lora_path": "sql", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
    with server.streaming("/generate", body) as response:
        events = response.iter_lines()
        next(events)
        deadline = time.monotonic() + 10
        while (found := samples(server)["vllm:lora_requests_info"][-1])[0]["running_lora_adapters"] != "sql":
            assert time.monotonic() < deadline
        assert found[0] == {"max_lora": "2", "running_lora_adapters": "sql", "waiting_lora_adapters": ""}
        assert abs(found[1] - time.time()) < 60
        server.post("/abort_request", {"abort_all": True})
        assert list(events)


@line
def gauges_of_vllm(server):
    """`vllm:num_requests_running`, `num_requests_waiting` and `kv_cache_usage_perc` are there."""
    found = samples(server)
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        [(labels, value)] = found[name]
        assert labels["model_name"] == BASE
        assert value >= 0


@line
def adapters_in_metrics(server):
    """`vllm:lora_adapter_loaded` has each adapter's name, level, rank and whether it is pinned."""
    found = {labels["adapter_name"]: labels for labels, _ in samples(server)["vllm:lora_adapter_loaded"]}
    assert set(found) == set(LOADED)
    assert {name: labels["rank"] for name, labels in found.items()} == {"pirate": "4", "sql": "16"}
    assert all({"level", "pinned"} <= set(labels) for labels in found.values())


@line
def own_metrics(server):
    """Ours count by adapter: requests, tokens, times, loads, evictions, bytes by tier, hits and misses."""
    server.native(lora_path="pirate")
    text = server.get("/metrics").text
    for name in PER_ADAPTER.split():
        lines = [row for row in text.splitlines() if row.startswith(f"multilora:{name}")]
        assert any('adapter_name="pirate"' in row for row in lines), name


@line
def metrics_of_both_peers(server):
    """The counters and histograms that both peers' boards read are there, by their names."""
    server.post("/generate", {"text": TEXT, "sampling_params": few()})
    found = samples(server)
    names = "cache_config_info prompt_tokens_total generation_tokens_total request_success_total"
    histograms = "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds"
    assert [n for n in names.split() if f"vllm:{n}" not in found] == []
    assert [n for n in histograms.split() if f"vllm:{n}_bucket" not in found] == []
    names = "num_running_reqs num_queue_reqs token_usage cache_hit_rate gen_throughput cache_config_info"
    assert [n for n in names.split() if f"sglang:{n}" not in found] == []
    histograms = "time_to_first_token_seconds inter_token_latency_seconds"
    assert [n for n in histograms.split() if f"sglang:{n}_bucket" not in found] == []


line.elsewhere(
    "boards",
    "Each query of the peers' Grafana boards and of the Gateway API inference extension has an answer.",
    "tests/server/test_peer_metrics.py::test_a_query_has_an_answer",
)
