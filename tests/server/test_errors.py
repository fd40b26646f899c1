"""Errors as responses: every kind of broken body, and typed errors of every status.

Covers `dialects.py` too.
"""

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import Connection, LocalServer, run
from fastapi import FastAPI

from multilora import errors as typed
from multilora.server.errors import error_body, install

BROKEN = {
    "nothing": (b"", "missing"),
    "half an object": (b'{"input_ids": [5', "not valid JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "a number": (b"5", "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
    "NaN": (
        b'{"input_ids": [5], "sampling_params": {"temperature": NaN}}',
        "not valid JSON: sampling_params.temperature = NaN",
    ),
    "infinite": (b'{"input_ids": [5], "timeout": -1e999}', "not valid JSON: timeout = -1e999"),
    "NaN in a list": (b'{"input_ids": [NaN]}', "not valid JSON: input_ids = NaN"),
    "NaN in a text": (b'{"text": "{\\"a\\": NaN}", "n": }', "not valid JSON: JSON is malformed"),
    "not UTF-8": (b'{"text": "\xff"}', "not valid JSON"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "not valid JSON"),
    "too deep": (b"[" * 100_000 + b"]" * 100_000, "not valid JSON"),
}


def server():
    return LocalServer(FakeEngineClient(), None)


@pytest.mark.parametrize(("body", "words"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/unload_lora_adapter"])
def test_a_broken_body_is_400(path, body, words):
    answer = server().post(path, body)
    assert answer.status == 400
    assert words in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {"prompt": 3}, "prompt: 3: "),
        ("/v1/completions", {"prompt": "a", "stop": 3}, "stop: 3: "),
        ("/v1/completions", {"prompt": "a", "logprobs": "3"}, "logprobs: '3': "),
    ],
)
def test_a_field_of_several_types_is_named_without_them(path, body, words):
    assert server().post(path, body).error["message"].startswith(words)


def test_json_must_be_sent_as_json():
    answer = run(sent_as(server(), b'{"input_ids": [5]}', "text/plain"))
    assert answer.status == 400
    assert "application/json" in answer.error["message"]


async def sent_as(s, body, content_type):
    return await Connection(s.app, "POST", "/generate", body, {"content-type": content_type}).answer()


def test_no_such_route_and_wrong_method_are_json():
    answer = server().get("/nope")
    assert (answer.status, answer.error["message"]) == (404, "no route GET /nope")
    answer = server().get("/generate")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.error["message"] == "Method Not Allowed"


@pytest.mark.parametrize(
    ("error", "status", "type_", "code"),
    [
        (typed.BadRequest("x", param="p"), 400, "invalid_request_error", "BadRequest"),
        (typed.AdapterInvalid("x"), 400, "invalid_request_error", "AdapterInvalid"),
        (typed.UnknownModel("x"), 404, "not_found_error", "model_not_found"),
        (typed.Unauthorized("x"), 401, "authentication_error", "invalid_api_key"),
        (typed.QueueFull("x"), 503, "service_unavailable_error", "QueueFull"),
        (typed.MultiloraError("x"), 500, "server_error", "MultiloraError"),
    ],
)
def test_typed_errors(error, status, type_, code):
    app = FastAPI()
    install(app, {})

    @app.get("/fail")
    async def fail():
        raise error

    answer = run(answer_of(app))
    assert answer.status == status
    assert answer.json() == error_body(error)
    assert answer.error == {"message": "x", "type": type_, "param": error.param, "code": code}
    assert ("retry-after" in answer.headers) == isinstance(error, typed.QueueFull)


async def answer_of(app):
    return await Connection(app, "GET", "/fail").answer()


def test_our_own_bug_is_500_without_its_text_and_is_raised_for_the_log():
    app = FastAPI()
    install(app, {})

    @app.get("/fail")
    async def fail():
        raise RuntimeError("secret")

    async def scenario():
        call = Connection(app, "GET", "/fail")
        with pytest.raises(RuntimeError, match="secret"):
            await call.task
        messages = [await call.next(), await call.next()]
        assert messages[0]["status"] == 500
        assert b"internal error: RuntimeError" in messages[1]["body"]
        assert b"secret" not in messages[1]["body"]

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/unload_lora_adapter", {"lora_name": "x" * 100_000}),
        ("/v1/unload_lora_adapter", {"lora_name": "x" * 100_000}),
        ("/v1/messages", {"model": "x" * 100_000, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"model": "x" * 100_000, "prompt": "a"}),
        ("/generate", {"input_ids": [5], "rid": "x" * 100_000}),
        ("/inference/v1/generate", {"token_ids": [5], "request_id": "x" * 100_000}),
    ],
)
def test_an_error_repeats_no_more_than_a_part_of_the_request(path, body):
    answer = server().post(path, body)
    assert answer.status in (400, 404)
    assert len(answer.body) < 3000


def test_a_rid_of_several_samples_counts_with_its_number():
    body = {"input_ids": [5], "rid": "x" * 255, "sampling_params": {"n": 2, "max_new_tokens": 1}}
    answer = server().post("/generate", body)
    assert (answer.status, answer.error["param"]) == (400, "rid")
    assert "257 characters; at most 256" in answer.error["message"]
