"""Health, facts, cache: the routes that generate nothing for a client.

Covers `head.py`, `app.py` too.
"""

from pathlib import Path

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

import multilora
from multilora.errors import ConfigError


def server(**config):
    return LocalServer(FakeEngineClient(), None, **config)


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping", "/health_generate"])
def test_health(path):
    s = server()
    assert s.get(path).status == 200
    s.client.die()
    answer = s.get(path)
    assert (answer.status, answer.error["code"]) == (503, "EngineDead")


def test_while_the_engine_is_being_started_again_the_server_is_healthy_but_not_ready():
    s = server()
    s.client.restarting = True
    assert s.get("/health").status == s.get("/ping").status == 200
    for path in ("/ready", "/health_generate"):
        answer = s.get(path)
        assert (answer.status, answer.error["code"]) == (503, "EngineRestarting")
        assert int(answer.headers["retry-after"]) > 0
    assert s.post("/generate", {"input_ids": [5]}).error["code"] == "EngineRestarting"
    s.client.restarting, s.client.restarts = False, 2
    assert s.get("/ready").status == 200
    assert "multilora:engine_restarts_total 2.0" in s.get("/metrics").text


def test_health_generate_waits_for_a_bounded_time(monkeypatch):
    monkeypatch.setattr("multilora.server.operations.GENERATE_SECONDS", 0.05)
    s = server()

    async def scenario():
        s.client.gate.clear()
        answer = await s.send("GET", "/health_generate")
        assert (answer.status, answer.error["code"]) == (503, "QueueFull")
        assert len(s.client.aborted) == 1

    run(scenario())


def test_health_generate_generates():
    s = server()
    s.get("/health_generate")
    assert s.client.submitted[0].sampling.max_new_tokens == 1
    s.client.answer = lambda m: 1 / 0
    s.client.refuse = lambda m: ValueError  # not reached: the answer of a dead engine
    s.client.die()
    assert s.get("/health_generate").status == 503


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(path):
    info = server(model_path="/models/llama").get(path).json()
    assert info["model_path"] == info["tokenizer_path"] == "/models/llama"
    assert info["is_generation"] is True
    assert (info["context_length"], info["vocab_size"]) == (256, 101)


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_shows_arguments_and_adapters_but_no_keys(path):
    s = server(max_loras_per_batch=3, api_key="topsecret", metrics_key="topsecret2")
    s.load("a")
    answer = s.get(path, authorization="Bearer topsecret")
    assert "topsecret" not in answer.text
    info = answer.json()
    assert info["max_loras_per_batch"] == 3
    assert info["version"]
    assert info["loaded_adapters"][0] == {
        "lora_name": "a",
        "lora_path": "/adapters/a",
        "version": 1,
        "weight_version": None,
        "pinned": False,
        "rank": 8,
        "target_modules": ["q_proj"],
        "vocab_size": 101,
        "active_requests": 0,
    }


def test_flush_cache():
    s = server()
    assert s.get("/flush_cache").status == 200
    assert s.post("/flush_cache").status == 200
    assert s.client.flushes == 2


def test_abort_request_needs_to_know_whom():
    s = server()
    assert s.post("/abort_request", {}).error["param"] == "rid"
    assert s.post("/abort_request", {"rid": ""}).status == 400
    assert s.post("/abort_request", {"rid": "unknown"}).status == 200
    assert s.post("/abort_request", {"rid": 5}).status == 400
    assert s.client.aborted == []


def test_the_api_describes_itself():
    s = LocalServer(FakeEngineClient(vocab_size=320), byte_level_tokenizer())
    paths = s.get("/openapi.json").json()["paths"]
    assert {"/generate", "/v1/completions", "/v1/chat/completions", "/load_lora_adapter", "/metrics"} <= set(paths)


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/ping", "/health_generate", "/metrics"])
def test_probes_by_head(path):
    s = server(api_key="k")
    assert run(s.send("HEAD", path)).status == 200
    assert s.get(path).status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/server_info", "/model_info", "/v1/loads", "/nope", "/generate"])
def test_head_is_get_without_a_body(path):
    s = server()
    head, get = run(s.send("HEAD", path)), s.get(path)
    assert (head.status, head.headers["content-type"]) == (get.status, get.headers["content-type"])
    assert (head.body, bool(get.body)) == (b"", True)


def test_paths_are_never_null():
    info = server().get("/server_info").json()
    assert info["model_path"] == info["tokenizer_path"] == server().get("/model_info").json()["model_path"]
    assert Path(info["tokenizer_path"], "tokenizer.json").exists()
    info = server(model_path="/m", tokenizer_path="/t").get("/server_info").json()
    assert (info["model_path"], info["tokenizer_path"], info["served_model_name"]) == ("/m", "/t", "base")


def test_tokenizer_info():
    s = LocalServer(FakeEngineClient(vocab_size=320), byte_level_tokenizer())
    info = s.get("/tokenizer_info").json()
    tokenizer = s.driver.front.vocabularies.base.tokenizer
    assert info["tokenizer_class"] == type(tokenizer.hf).__name__
    assert info["chat_template"] == (tokenizer.chat_template or None)
    assert not [name for name in info if name.endswith("_file")]
    answer = server().get("/tokenizer_info")
    assert (answer.status, "tokenizer" in answer.error["message"]) == (400, True)


def test_ping_by_post():
    s = server()
    assert s.post("/ping").status == 200
    s.client.die()
    assert s.post("/ping").status == 503


def test_version():
    s = server()
    assert s.get("/version").json() == {"version": multilora.__version__}
    assert s.get("/").json() == {"name": "multilora", "version": multilora.__version__}


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


@pytest.mark.parametrize("origins", [("*",), ("https://a.example", "http://b.example:8080")])
def test_pages_of_the_given_origins_may_call(origins):
    s = server(cors_origins=origins, api_key="k")
    here = {"origin": "http://b.example:8080"}
    answer = cors(s, "OPTIONS", "/v1/completions", here | PREFLIGHT)
    assert answer.status == 200
    allowed = "*" if origins == ("*",) else here["origin"]
    assert answer.headers["access-control-allow-origin"] == allowed
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    refused = cors(s, "GET", "/v1/models", here)
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, allowed)


def test_pages_of_other_origins_may_not_call():
    for s in (server(cors_origins=("https://a.example",)), server()):
        for method, headers in (("OPTIONS", PREFLIGHT), ("GET", {})):
            answer = cors(s, method, "/v1/models", {"origin": "https://evil.example"} | headers)
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/", "https://a.example/page", ""])
def test_what_is_no_origin_is_refused_at_the_start(origin):
    with pytest.raises(ConfigError, match="--cors-origins"):
        server(cors_origins=(origin,))


def cors(s, method, path, headers):
    return run(s.send(method, path, **headers))
