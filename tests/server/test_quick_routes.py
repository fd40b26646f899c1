"""The quicker making of routes in tests (`tests/support`) finds in a function what FastAPI finds itself."""

from typing import Annotated, Any

import pytest
import quick_routes
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fastapi import FastAPI, Query, routing
from fastapi.testclient import TestClient


def test_the_replacements_are_in_place() -> None:
    assert None not in quick_routes.own.values(), "FastAPI has changed"
    assert {name: getattr(routing, name) for name in quick_routes.own} != quick_routes.own


@pytest.mark.slow
def test_the_same_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """All routes of the server: paths, parameters, bodies and answers."""
    quick = [LocalServer(FakeEngineClient(), None).app.openapi() for _ in range(2)]
    for name, part in quick_routes.own.items():
        monkeypatch.setattr(routing, name, part)
    assert quick == [LocalServer(FakeEngineClient(), None).app.openapi()] * 2


def app_of(default: int, kind: Any) -> FastAPI:
    app = FastAPI()

    @app.get("/")
    async def value(n: Annotated[kind, Query()] = default) -> Any:
        return n

    return app


def test_closures_of_one_function_keep_their_own_defaults_and_types() -> None:
    apps = [app_of(1, int), app_of(2, int), app_of(2, str)]
    assert [TestClient(app).get("/").json() for app in apps] == [1, 2, 2]
    assert [TestClient(app).get("/?n=7").json() for app in apps] == [7, 7, "7"]
