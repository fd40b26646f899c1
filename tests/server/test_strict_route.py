"""Routes that read their bodies strictly, small and large ones alike."""

import json
from typing import ClassVar

import pytest
from fakes.server_app import Connection, run
from fastapi import APIRouter, FastAPI

from multilora.server import errors
from multilora.server.bodies import Body
from multilora.server.request_body import INLINE_BYTES, Bodies
from multilora.server.strict_route import StrictRoute


class Numbers(Body):
    where = "/numbers"
    number: int
    padding: str | None = None


class SmallRoute(StrictRoute):
    max_body_bytes = 100
    advice: ClassVar[str] = ": say less"


def app() -> FastAPI:
    made = FastAPI()
    made.state.bodies = Bodies(1 << 20)
    errors.install(made, {})
    for path, kind in (("/numbers", StrictRoute), ("/small", SmallRoute)):
        routes = APIRouter(route_class=kind)

        @routes.post(path)
        async def doubled(body: Numbers) -> int:
            return 2 * body.number

        made.include_router(routes)
    return made


def post(path: str, body: bytes, content_type: str = "application/json"):
    async def answer():
        return await Connection(app(), "POST", path, body, {"content-type": content_type}).answer()

    return run(answer())


@pytest.mark.parametrize("size", [0, 2 * INLINE_BYTES])
def test_small_and_large_bodies_mean_the_same(size):
    padding = {"padding": "x" * size}
    assert post("/numbers", json.dumps({"number": 21} | padding).encode()).json() == 42
    answer = post("/numbers", json.dumps({"number": "21"} | padding).encode())
    assert (answer.status, answer.error["param"]) == (400, "number")
    answer = post("/numbers", json.dumps({"number": 21} | padding).encode()[:-1])
    assert "not valid JSON" in answer.error["message"]
    answer = post("/numbers", json.dumps([21, "x" * size]).encode())
    assert answer.error["message"] == "the body must be a JSON object, sent as application/json"
    answer = post("/numbers", json.dumps({"number": 21} | padding).encode(), "text/plain")
    assert answer.error["message"] == "the body must be a JSON object, sent as application/json"


def test_a_route_has_a_limit_and_advice_of_its_own():
    body = json.dumps({"number": 21, "padding": "x" * 100}).encode()
    assert post("/numbers", body).status == 200
    answer = post("/small", body)
    assert answer.status == 413
    assert answer.error["message"] == "the body has over 100 bytes: say less"
