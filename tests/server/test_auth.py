"""API keys: who may do what."""

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer

from multilora.server.auth import ADMIN_PATHS, METRICS_PATHS, OPEN_PATHS

USER, ADMIN = {"authorization": "Bearer user"}, {"authorization": "Bearer admin"}
WRONG = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "user"},
    {"authorization": "Basic user"},
    {"authorization": "Bearer "},
    {"authorization": "Bearer üser"},
]


def server(**keys):
    return LocalServer(FakeEngineClient(), None, **keys)


def test_without_keys_everything_is_open():
    s = server()
    assert s.get("/v1/models").status == 200
    assert s.post("/flush_cache").status == 200


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
    paths = OPEN_PATHS | METRICS_PATHS
    assert {path: s.get(path).status for path in paths} == dict.fromkeys(paths, 200)


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


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_the_admin_key_alone_changes_the_server(path):
    s = server(api_key="user", admin_api_key="admin")
    assert s.post(path, {}, **USER).status == 401
    assert s.post(path, {}, **ADMIN).status in (200, 400)
    assert s.get("/v1/models", **USER).status == 200
    assert s.get("/v1/models", **ADMIN).status == 200


def test_only_an_admin_key():
    s = server(admin_api_key="admin")
    assert s.get("/v1/models").status == 200
    assert s.post("/flush_cache").status == 401
    assert s.post("/flush_cache", **ADMIN).status == 200
