"""/metrics: names that other tools read, per-adapter numbers, and labels that go with their adapter.

Covers `metrics/collector.py`, `metrics/adapters.py`, `metrics/own.py`, `metrics/usage.py`, `metrics/totals.py`,
`metrics/http.py` too.
"""

import asyncio

import msgspec
import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from prometheus_client.parser import text_string_to_metric_families

from multilora.engine.messages import AdapterStats, PauseState
from multilora.errors import BadRequest

VLLM = {"model_name": "base", "engine": "0"}
REQUESTS = {"model_name": "base", "engine_type": "unified"}
SGLANG = REQUESTS | {"tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}


def server(**config):
    return LocalServer(FakeEngineClient(), None, **config)


def samples(s):
    """{(name, sorted labels): value}"""
    answer = s.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(x.name, tuple(sorted(x.labels.items()))): x.value for f in families for x in f.samples}


def value(s, name, **labels):
    return samples(s)[name, tuple(sorted(labels.items()))]


def adapter(version, **fields):
    known = {"level": "device", "pinned": False, "rank": 8, "load_seconds": 0.5}
    zero = dict.fromkeys((f for f in AdapterStats.__struct_fields__ if f not in known), 0)
    return AdapterStats(**(zero | known | {"version": version} | fields))


def with_stats(s, **fields):
    s.client.stats = msgspec.structs.replace(s.client.stats, **fields)


def test_an_idle_server_has_all_names_of_its_peers():
    names = {name for name, _ in samples(server())}
    wanted = """sglang:lora_pool_slots_used sglang:lora_pool_slots_total sglang:lora_pool_utilization
        vllm:lora_requests_info vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc"""
    assert set(wanted.split()) <= names


def test_requests_and_tokens_per_adapter():
    s = server()
    s.load("a")
    s.post(
        "/generate", {"input_ids": [[5, 6], [5]], "lora_path": ["a", None], "sampling_params": {"max_new_tokens": 3}}
    )
    s.post("/generate", {"input_ids": [5], "lora_path": "a", "sampling_params": {"max_new_tokens": 1}})
    assert value(s, "multilora:requests_total", adapter_name="a", finish_reason="length") == 2
    assert value(s, "multilora:requests_total", adapter_name="base", finish_reason="length") == 1
    assert value(s, "multilora:prompt_tokens_total", adapter_name="a") == 3
    assert value(s, "multilora:generation_tokens_total", adapter_name="a") == 4
    assert value(s, "multilora:time_to_first_token_seconds_count", adapter_name="a") == 2
    assert value(s, "multilora:request_queue_time_seconds_count", adapter_name="base") == 1


def test_a_refused_request_is_counted_as_an_error_only():
    s = server()
    s.post("/generate", {"input_ids": [999]})
    assert not [key for key in samples(s) if key[0].startswith("multilora:requests")]
    assert value(s, "multilora:request_errors_total", adapter_name="other", error="BadRequest") == 1
    s.client.refuse = lambda m: BadRequest("no")
    s.post("/generate", {"input_ids": [5]})
    assert value(s, "multilora:request_errors_total", adapter_name="base", error="BadRequest") == 1
    assert value(s, "multilora:requests_total", adapter_name="base", finish_reason="error") == 1


def total_of(found, name, **labels):
    return sum(v for (n, has), v in found.items() if n == name and labels.items() <= dict(has).items())


PEERS_TOTALS = {
    "multilora:requests_total": "vllm:request_success_total",
    "multilora:prompt_tokens_total": "vllm:prompt_tokens_total",
    "multilora:prompt_tokens_cached_total": "vllm:prompt_tokens_cached_total",
    "multilora:generation_tokens_total": "vllm:generation_tokens_total",
    "multilora:time_to_first_token_seconds_count": "vllm:time_to_first_token_seconds_count",
    "multilora:inter_token_latency_seconds_count": "vllm:inter_token_latency_seconds_count",
    "multilora:request_queue_time_seconds_count": "vllm:request_queue_time_seconds_count",
}


def test_the_labels_add_up_to_the_total_while_they_change(monkeypatch):
    monkeypatch.setattr("multilora.server.metrics.top_names.RANK_SECONDS", 0.0)
    s = server(max_metrics_labels=2)
    names = [f"a{i}" for i in range(6)]
    s.load(*names)
    before, labels = {}, []
    for i in range(24):
        body = {"input_ids": [5, 6], "lora_path": names[i // 4], "sampling_params": {"max_new_tokens": 1 + i % 3}}
        s.post("/generate", body)
        if i == 17:
            s.post("/unload_lora_adapter", {"lora_name": names[i // 4]})
            s.load(names[i // 4])
        found = samples(s)
        for name, peers in PEERS_TOTALS.items():
            assert total_of(found, name) == total_of(found, peers), name
        used = {dict(has)["adapter_name"] for n, has in found if n == "multilora:requests_started_total"}
        labels.append(used - {"other", "retired"})
        assert len(labels[-1]) <= 2
        for key, v in found.items():  # what is there before and after has not gone backwards
            gone_between = dict(key[1]).get("adapter_name") == names[4]  # it was unloaded, and loaded again
            if key[0].startswith("multilora:") and key[0].endswith(("_total", "_count", "_sum")):
                assert gone_between or v >= before.get(key, 0)
        before = found
    assert len(set().union(*labels)) > 2, "no label ever changed"


def test_adapters_without_a_label_are_summed_up():
    s = server(max_metrics_labels=1)
    s.load("a", "b", "c")
    s.post("/generate", {"input_ids": [5], "lora_path": "a"})
    stats = [adapter(1, loads=1, host_bytes=3), adapter(2, loads=2, running=1), adapter(3, loads=4, running=2)]
    with_stats(s, adapters=stats)
    assert value(s, "multilora:adapter_loads_total", adapter_name="other") == 6
    assert value(s, "multilora:adapter_requests_running", adapter_name="other") == 3
    assert value(s, "multilora:adapter_bytes", adapter_name="a", tier="host") == 3
    assert value(s, "vllm:lora_adapter_loaded", adapter_name="other", level="device", pinned="false", rank="8") == 2
    s.post("/unload_lora_adapter", {"lora_name": "b"})
    with_stats(s, adapters=[stats[0], adapter(3, loads=5)])
    assert value(s, "multilora:adapter_loads_total", adapter_name="other") == 7, "nothing is taken away"
    with_stats(s, adapters=[stats[0], adapter(3, loads=2)])
    assert value(s, "multilora:adapter_loads_total", adapter_name="other") == 9, "another engine began at 0"


def test_the_engines_numbers():
    s = server(max_loras_per_batch=4)
    s.load("a", "b")
    stats = [
        adapter(1, running=2, loads=3, evictions=2, hits=5, misses=1, host_bytes=10, device_bytes=20, pinned=True),
        adapter(2, waiting=1, level="host", rank=16),
    ]
    with_stats(
        s,
        running=2,
        waiting=1,
        total_pages=100,
        free_pages=25,
        prefix_pages=25,
        kv_pages=40,
        adapter_pages=10,
        slots_total=4,
        slots_used=1,
        adapters=stats,
    )
    assert value(s, "sglang:lora_pool_slots_used", **SGLANG) == 1
    assert value(s, "sglang:lora_pool_slots_total", **SGLANG) == 4
    assert value(s, "sglang:lora_pool_utilization", **SGLANG) == 0.25
    assert value(s, "vllm:num_requests_running", **VLLM) == value(s, "sglang:num_running_reqs", **SGLANG) == 2
    assert value(s, "vllm:num_requests_waiting", **VLLM) == value(s, "sglang:num_queue_reqs", **SGLANG) == 1
    assert value(s, "vllm:num_requests_waiting_by_reason", reason="deferred", **VLLM) == 1
    assert value(s, "vllm:kv_cache_usage_perc", **VLLM) == value(s, "sglang:token_usage", **SGLANG) == 0.5
    labels = {"max_lora": "4", "running_lora_adapters": "a", "waiting_lora_adapters": "b"}
    assert value(s, "vllm:lora_requests_info", **labels) > 1e9
    assert value(s, "vllm:lora_adapter_loaded", adapter_name="a", level="device", pinned="true", rank="8") == 1
    assert value(s, "vllm:lora_adapter_loaded", adapter_name="b", level="host", pinned="false", rank="16") == 1
    assert value(s, "multilora:adapter_loads_total", adapter_name="a") == 3
    assert value(s, "multilora:adapter_evictions_total", adapter_name="a") == 2
    assert value(s, "multilora:adapter_load_seconds_total", adapter_name="a") == 0.5
    assert value(s, "multilora:adapter_hits_total", adapter_name="a") == 5
    assert value(s, "multilora:adapter_bytes", adapter_name="a", tier="device") == 20
    assert value(s, "multilora:pages", use="kv") == 40


@pytest.mark.parametrize(
    ("pause", "expected"),
    [
        (PauseState(mode="keep"), [1, 0, 0]),
        (PauseState(mode="keep", sleeping=True), [0, 0, 0]),
        (PauseState(mode="keep", sleeping=True, level=1), [0, 1, 0]),
        (PauseState(mode="keep", sleeping=True, level=2), [0, 0, 1]),
    ],
    ids=["paused", "level 0", "level 1", "level 2"],
)
def test_how_deep_the_engine_sleeps(pause, expected):
    s = server()
    with_stats(s, pause=pause)
    states = ("awake", "weights_offloaded", "discard_all")
    assert [value(s, "vllm:engine_sleep_state", sleep_state=state, **VLLM) for state in states] == expected


def test_two_versions_of_a_name_are_one():
    s = server()
    s.load("a")

    async def scenario():
        s.client.gate.clear()
        call = s.connect("POST", "/generate", {"input_ids": [5], "lora_path": "a"})
        while not s.client.submitted:
            await asyncio.sleep(0)
        await s.load_from("a", "/new", replace=True)
        with_stats(s, adapters=[adapter(1, hits=2), adapter(2, hits=3), adapter(99, hits=7)])
        text = (await s.send("GET", "/metrics")).text
        assert 'multilora:adapter_hits_total{adapter_name="a"} 5.0' in text
        assert text.count("multilora:adapter_hits_total{") == 1
        assert text.count("vllm:lora_adapter_loaded{") == 1
        s.client.gate.set()
        await call.answer()

    run(scenario())


def test_an_adapter_that_is_gone_leaves_no_label():
    s = server()
    s.load("gone")
    s.post("/generate", {"input_ids": [5], "lora_path": "gone"})
    with_stats(s, adapters=[adapter(1)])
    assert "gone" in s.get("/metrics").text
    s.post("/unload_lora_adapter", {"lora_name": "gone"})
    assert "gone" not in s.get("/metrics").text


def test_unloading_an_adapter_that_was_never_used():
    s = server()
    s.load("a")
    assert s.post("/unload_lora_adapter", {"lora_name": "a"}).status == 200


def test_names_with_odd_characters_are_escaped():
    s = server()
    name = 'a"b\\c,d é'
    s.load(name)
    s.post("/generate", {"input_ids": [5], "lora_path": name, "sampling_params": {"max_new_tokens": 2}})
    assert value(s, "multilora:generation_tokens_total", adapter_name=name) == 2


def test_tokens_and_times_for_both_peers():
    s = server()
    s.load("a")
    body = {"input_ids": [[5, 6], [5]], "lora_path": ["a", None], "sampling_params": {"max_new_tokens": 3}}
    s.post("/generate", body)
    for prefix, labels in (("vllm", VLLM), ("sglang", REQUESTS)):
        assert value(s, f"{prefix}:prompt_tokens_total", **labels) == 3
        assert value(s, f"{prefix}:generation_tokens_total", **labels) == 6
        assert value(s, f"{prefix}:time_to_first_token_seconds_count", **labels) == 2
        assert value(s, f"{prefix}:inter_token_latency_seconds_count", **labels) == 4
        assert value(s, f"{prefix}:e2e_request_latency_seconds_bucket", le="+Inf", **labels) == 2
        assert value(s, f"{prefix}:request_time_per_output_token_seconds_count", **labels) == 2
    assert value(s, "vllm:request_success_total", finished_reason="length", **VLLM) == 2
    assert value(s, "vllm:request_success_total", finished_reason="error", **VLLM) == 0
    assert value(s, "vllm:request_generation_tokens_bucket", le="2.0", **VLLM) == 0
    assert value(s, "vllm:request_generation_tokens_bucket", le="5.0", **VLLM) == 2
    assert value(s, "vllm:request_params_max_tokens_sum", **VLLM) == 6
    assert value(s, "vllm:prompt_tokens_by_source_total", source="local_cache_hit", **VLLM) == 2
    assert value(s, "sglang:cached_tokens_total", cache_source="device", **REQUESTS) == 2


def test_a_request_that_never_ran_has_no_times():
    s = server()
    s.client.refuse = lambda m: BadRequest("no")
    assert s.post("/generate", {"input_ids": [5]}).status == 400

    async def aborted():
        s.client.refuse = lambda m: None
        s.client.gate.clear()
        call = s.connect("POST", "/generate", {"input_ids": [5]})
        while len(s.client.submitted) < 2:
            await asyncio.sleep(0)
        call.hang_up()
        await call.answer()
        s.client.gate.set()

    run(aborted())
    assert value(s, "vllm:request_success_total", finished_reason="abort", **VLLM) == 1
    assert value(s, "vllm:request_success_total", finished_reason="error", **VLLM) == 1
    assert value(s, "vllm:request_prompt_tokens_count", **VLLM) == 2
    assert value(s, "vllm:e2e_request_latency_seconds_count", **VLLM) == 0
    assert value(s, "vllm:time_to_first_token_seconds_count", **VLLM) == 0


def test_steps_by_their_tokens():
    s = server()
    with_stats(s, step_tokens=[0, 1, 2, 3], prompt_tokens=20, generated_tokens=5)
    assert value(s, "vllm:iteration_tokens_total_bucket", le="1.0", **VLLM) == 0
    assert value(s, "vllm:iteration_tokens_total_bucket", le="8.0", **VLLM) == 6
    assert value(s, "vllm:iteration_tokens_total_sum", **VLLM) == 25


def test_an_idle_engine_generates_nothing():
    s = server()
    with_stats(s, gen_throughput=50.0, running=1)
    assert value(s, "sglang:gen_throughput", **SGLANG) == 50
    with_stats(s, running=0)
    assert value(s, "sglang:gen_throughput", **SGLANG) == 0


def test_http_requests_by_route_not_by_what_clients_make_up():
    s = server()
    s.load("a")
    s.get("/v1/models/a")
    s.get("/v1/models/nobody")
    for path in ("/made-up", "/made-up-2"):
        run(s.send("BREW", path))
    s.get("/health")
    counted = {key[1]: v for key, v in samples(s).items() if key[0] == "http_requests_total"}
    assert counted == {
        (("handler", "/v1/models/{name:path}"), ("method", "GET"), ("status", "2xx")): 1,
        (("handler", "/v1/models/{name:path}"), ("method", "GET"), ("status", "4xx")): 1,
        (("handler", "none"), ("method", "other"), ("status", "4xx")): 2,
    }
    assert value(s, "http_request_duration_seconds_count", handler="none", method="other") == 2
