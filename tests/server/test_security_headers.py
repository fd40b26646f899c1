"""Headers for browsers and caches, on every kind of answer."""

import asyncio

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer

from multilora.server.security_headers import HEADERS, SecurityHeaders


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/v1/models", 401), ("/nope", 401), ("/metrics", 200)]
)
def test_every_answer_has_them(path, status):
    answer = LocalServer(FakeEngineClient(), None, api_key="k").get(path)
    assert answer.status == status
    assert {name: answer.headers[name.lower()] for name in HEADERS} == HEADERS
    assert "strict-transport-security" not in answer.headers


def test_pages_with_scripts_may_load_them():
    answer = LocalServer(FakeEngineClient(), None).get("/docs")
    assert "script" in answer.text
    assert "content-security-policy" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_over_tls_browsers_are_told_to_stay_there_and_what_is_set_stays():
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"max-age=1")]})

    async def keep(message):
        sent.append(message)

    asyncio.run(SecurityHeaders(app)({"type": "http", "scheme": "https", "path": "/"}, None, keep))
    headers = dict(sent[0]["headers"])
    assert headers[b"strict-transport-security"].startswith(b"max-age=")
    assert headers[b"cache-control"] == b"max-age=1"
