"""API keys of the flags: who may do what. Keys of a file are in `test_tenants.py`.

Covers `key_ring.py` too.
"""

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run

from multilora.server.access_rules import RULES, Need

USER, ADMIN = {"authorization": "Bearer user"}, {"authorization": "Bearer admin"}
WRONG = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "user"},
    {"authorization": "Basic user"},
    {"authorization": "Bearer "},
    {"authorization": "Bearer üser"},
]
ADMIN_PATHS = [path for path, rule in RULES.items() if rule.need in (Need.ADMIN, Need.LOADS, Need.ABORTS)]
OPEN_PATHS = [path for path, rule in RULES.items() if rule.need in (Need.NOTHING, Need.SCRAPE)]


def server(**keys):
    return LocalServer(FakeEngineClient(), None, **keys)


def test_without_keys_everything_is_open():
    s = server()
    assert s.get("/v1/models").status == 200
    assert s.post("/flush_cache").status == s.get("/flush_cache").status == 200


@pytest.mark.parametrize("headers", WRONG)
def test_a_missing_or_wrong_key_is_401(headers):
    s = server(api_key="user")
    for path in ("/v1/models", "/server_info", "/openapi.json", "/nope", "/flush_cache", "/flush_cache/"):
        answer = s.get(path, **headers)
        assert answer.status == 401
        assert answer.error["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert s.client.flushes == 0


def test_probes_and_metrics_stay_open():
    s = server(api_key="user", admin_api_key="admin")
    assert {path: s.get(path).status for path in OPEN_PATHS} == dict.fromkeys(OPEN_PATHS, 200)


@pytest.mark.parametrize("keys", [{}, {"api_key": "user", "admin_api_key": "admin"}])
def test_metrics_have_a_key_of_their_own(keys):
    s = server(metrics_key="scrape", **keys)
    for headers in ({}, USER, {"authorization": "Bearer wrong"}):
        assert s.get("/metrics", **headers).status == s.get("/metrics/", **headers).status == 401
    assert s.get("/metrics", authorization="Bearer scrape").status == 200
    assert s.get("/metrics", **ADMIN).status == (200 if keys else 401)
    assert s.get("/health").status == 200
    assert s.get("/v1/models").status == (401 if keys else 200)
    assert s.get("/v1/models", authorization="Bearer scrape").status == (401 if keys else 200)


def test_one_key_opens_everything():
    s = server(api_key="user")
    assert s.get("/v1/models", **USER).status == 200
    assert s.post("/flush_cache", **USER).status == 200
    assert s.get("/v1/models", authorization="bearer user").status == 200
    assert s.get("/v1/models", **{"x-api-key": "user"}).status == 200
    assert s.get("/nope", **USER).status == 404


@pytest.mark.parametrize("keys", [{"api_key": "user"}, {"admin_api_key": "user"}])
def test_get_flushes_nothing_while_there_are_keys(keys):
    s = server(**keys)
    answer = s.get("/flush_cache", **USER)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert s.client.flushes == 0


READ_ONLY = {"/console/log"}


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_the_admin_key_alone_changes_the_server(path):
    s = server(api_key="user", admin_api_key="admin")

    def status(headers):
        return (s.get(path, **headers) if path in READ_ONLY else s.post(path, {}, **headers)).status

    assert status(USER) == 401
    assert status(ADMIN) in (200, 400)
    assert s.get("/v1/models", **USER).status == 200
    assert s.get("/v1/models", **ADMIN).status == 200


def test_only_an_admin_key():
    s = server(admin_api_key="admin")
    assert s.get("/v1/models").status == 200
    assert s.get("/load").status == 200
    assert s.post("/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}).status == 200
    assert s.post("/flush_cache").status == 401
    assert s.post("/abort_request", {"rid": "x"}).status == 401
    assert s.post("/flush_cache", **ADMIN).status == 200


def test_a_key_alone_loads_directories_only_below_a_root(tmp_path):
    body = {"lora_name": "a", "lora_path": str(tmp_path)}
    answer = server(api_key="user").post("/load_lora_adapter", body, **USER)
    assert answer.status == 400
    assert "only below a --lora-root" in answer.json()["error_message"]
    hub = server(api_key="user").post("/load_lora_adapter", body | {"lora_path": "org/name"}, **USER)
    assert "no --lora-resolver-hub" in hub.json()["error_message"]
    for keys in ({"api_key": "user", "lora_root": (str(tmp_path.parent),)}, {"admin_api_key": "user"}, {}):
        assert server(**keys).post("/load_lora_adapter", body, **USER).status == 200


def test_what_the_operator_loads_at_start_may_lie_anywhere(tmp_path):
    s = server(api_key="user")
    run(s.load_from("a", str(tmp_path)))
    assert s.registry.loaded() == {"a": str(tmp_path)}
