"""How busy the server says it is: SGLang's and vLLM's routes for those who balance load."""

import asyncio

import msgspec
import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run

STATS = {
    "running": 2,
    "waiting": 1,
    "total_pages": 100,
    "free_pages": 25,
    "prefix_pages": 25,
    "kv_pages": 40,
    "adapter_pages": 10,
    "page_bytes": 1 << 20,
    "slots_total": 4,
    "slots_used": 1,
    "gen_throughput": 12.5,
    "cache_hit_rate": 0.25,
}

# LoadSnapshot of sglang 0.5.23, srt/managers/load_snapshot.py:196, but for what is not measured here
CORE = """timestamp dp_rank num_running_reqs num_waiting_reqs num_waiting_uncached_tokens num_used_tokens
    num_total_tokens num_active_tokens num_prealloc_ready_tokens max_total_num_tokens max_running_requests token_usage
    gen_throughput cache_hit_rate utilization total_prefill_uncached_tokens"""


@pytest.fixture
def s():
    server = LocalServer(FakeEngineClient(), None, page_size=16, max_running_requests=8)
    server.client.stats = msgspec.structs.replace(server.client.stats, **STATS)
    return server


def test_v1_loads(s):
    answer = s.get("/v1/loads").json()
    assert set(answer) == {"timestamp", "version", "accelerator", "num_accelerators", "loads"}
    (load,) = answer["loads"]
    assert set(load) == {*CORE.split(), "memory", "lora", "queues"}
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (2, 1)
    assert (load["num_used_tokens"], load["max_total_num_tokens"]) == (640, 1600)
    assert (load["token_usage"], load["utilization"]) == (0.5, 0.25)
    assert (load["gen_throughput"], load["cache_hit_rate"]) == (12.5, 0.25)
    assert load["lora"] == {"slots_used": 1, "slots_total": 4, "utilization": 0.25}
    assert load["memory"]["token_capacity"] == 1600


def test_sections(s):
    assert set(s.get("/v1/loads?include=core").json()["loads"][0]) == set(CORE.split())
    assert set(s.get("/v1/loads?include=lora,queues").json()["loads"][0]) - set(CORE.split()) == {"lora", "queues"}
    assert set(s.get("/v1/loads?include=spec,disagg").json()["loads"][0]) == set(CORE.split())
    assert s.get("/v1/loads?dp_rank=0").json()["loads"]
    assert s.get("/v1/loads?dp_rank=1").json()["loads"] == []


@pytest.mark.parametrize(
    ("query", "param"), [("include=nope", "include"), ("format=xml", "format"), ("dp_rank=x", "dp_rank")]
)
def test_a_bad_query_is_named(s, query, param):
    answer = s.get(f"/v1/loads?{query}")
    assert (answer.status, answer.error["param"]) == (400, param)


def test_prometheus(s):
    answer = s.get("/v1/loads?format=prometheus")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'sglang_num_running_reqs{dp_rank="0"} 2' in lines
    assert 'sglang_lora_slots_total{dp_rank="0"} 4' in lines
    assert "# TYPE sglang_token_usage gauge" in lines


def test_waiting_requests_count_with_their_prompts(s):
    async def scenario():
        assert (await s.send("GET", "/load")).json() == {"server_load": 0}
        s.client.gate.clear()
        call = s.connect("POST", "/generate", {"input_ids": [[5, 6, 7], [8]]})
        while len(s.client.submitted) < 2:
            await asyncio.sleep(0)
        assert (await s.send("GET", "/load")).json() == {"server_load": 2}
        load = (await s.send("GET", "/v1/loads")).json()["loads"][0]
        assert (load["num_waiting_uncached_tokens"], load["num_total_tokens"]) == (4, 644)
        (old,) = (await s.send("GET", "/get_load")).json()
        assert old == {"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 1, "num_tokens": 644}
        s.client.gate.set()
        await call.answer()
        assert (await s.send("GET", "/load")).json() == {"server_load": 0}

    run(scenario())


def test_what_sglangs_benchmarks_read_in_server_info(s):
    """sglang/benchmark/one_batch_server.py:965 and :1288, serving.py:1643 of 0.5.23."""
    info = s.get("/server_info").json()
    assert info["tokenizer_path"]
    assert info["page_size"] == 16
    (state,) = info["internal_states"]
    assert state["effective_max_running_requests_per_dp"] == 8
    assert state["last_gen_throughput"] == 12.5
    assert state["memory_usage"]["token_capacity"] == 1600
    assert state["dp_size"] * (state.get("attn_dp_size") or 1) == 1
    assert state.get("avg_spec_accept_length") is None
    assert state["running"] == 2
