"""`timeout` and `--max-request-seconds`, through HTTP and a real engine."""

import time

import pytest
from doors import HttpDoor

from multilora.demo import base_model_path
from multilora.errors import BadRequest, DeadlineExceeded

ROUTES = {
    "/generate": {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 100_000, "ignore_eos": True}},
    "/v1/completions": {"prompt": [5, 6, 7], "max_tokens": 100_000, "ignore_eos": True},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 100_000,
        "ignore_eos": True,
    },
}


@pytest.fixture(scope="module")
def door():
    door = HttpDoor(base_model_path(), max_request_seconds=20)
    yield door
    door.close()


def reason_of(answer: dict) -> str:
    return (
        answer["choices"][0]["finish_reason"] if "choices" in answer else answer["meta_info"]["finish_reason"]["type"]
    )


@pytest.mark.parametrize("route", ROUTES)
def test_what_has_come_by_then_is_the_answer(door, route):
    started = time.monotonic()
    answer = door.post(route, ROUTES[route] | {"timeout": 0.4}).json()
    assert reason_of(answer) in ("abort", "length"), "length: a machine that fills the whole context in time"
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("route", ROUTES)
def test_without_a_token_it_is_an_error(door, route):
    with pytest.raises(DeadlineExceeded):
        door.post(route, ROUTES[route] | {"timeout": 1e-9})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [0, -1, 1e9])
def test_a_bad_timeout_is_named(door, route, value):
    with pytest.raises(BadRequest, match="timeout"):
        door.post(route, ROUTES[route] | {"timeout": value})
