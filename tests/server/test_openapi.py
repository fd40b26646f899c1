"""/openapi.json says what the routes take and answer: fields, bounds, errors, streams and keys.

Covers `openapi_fields.py` too.
"""

import inspect
import threading
import time

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer
from starlette.requests import Request

from multilora.errors import BadRequest
from multilora.params import SamplingParams
from multilora.server import openapi
from multilora.server.openapi_fields import SAMPLING


@pytest.fixture(scope="module")
def document():
    return LocalServer(FakeEngineClient(vocab_size=320), byte_level_tokenizer()).get("/openapi.json").json()


def properties(document):
    return {
        (body, name): field
        for body, schema in document["components"]["schemas"].items()
        if body.endswith(("Body", "SamplingParams", "StreamOptions"))
        for name, field in schema["properties"].items()
    }


def references(node):
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_leads_somewhere(document):
    for reference in references(document):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_every_field_is_described(document):
    assert [key for key, field in properties(document).items() if not field.get("description")] == []


@pytest.mark.parametrize("name", [name for name, field in SAMPLING.items() if len(field) > 1])
def test_bounds_are_those_that_are_checked(name):
    field = SAMPLING[name]
    for bound, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0)):
        if bound in field:
            with pytest.raises(BadRequest, match=name):
                SamplingParams.parse({name: field[bound] + step - (name == "top_k")})
    for bound in ("minimum", "maximum"):
        if bound in field:
            SamplingParams.parse({name: field[bound]})


def test_bounds_stand_at_the_number_not_beside_it(document):
    temperature = properties(document)["CompletionBody", "temperature"]
    assert {"type": "number", "minimum": 0} in temperature["anyOf"]
    assert properties(document)["SamplingParams", "min_p"]["maximum"] == 1


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_answers_streams_and_errors(document, path):
    responses = document["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "403", "404", "413", "429", "503"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert responses["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")


def test_it_is_made_once_and_on_a_thread(monkeypatch):
    s = LocalServer(FakeEngineClient(vocab_size=320), byte_level_tokenizer())
    made = []

    def complete(document):
        time.sleep(0.05)
        made.append(threading.current_thread())
        return document

    monkeypatch.setattr(openapi, "complete", complete)
    routes = [route for route in s.app.router.routes if getattr(route, "path", "") == "/openapi.json"]
    (route,) = routes
    asked = [threading.Thread(target=route.endpoint, args=(Request({"type": "http"}),)) for _ in range(4)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert len(made) == 1
    assert not inspect.iscoroutinefunction(route.endpoint), "Starlette calls what is no coroutine on a thread"
    assert s.get("/openapi.json").json() == s.app.openapi()


def test_answers_are_as_described():
    s = LocalServer(FakeEngineClient(vocab_size=320), byte_level_tokenizer())
    schemas = s.get("/openapi.json").json()["components"]["schemas"]
    found = {
        "Generated": s.post("/generate", {"text": "hi", "sampling_params": {"max_new_tokens": 2}}),
        "Completion": s.post("/v1/completions", {"prompt": "hi", "max_tokens": 2}),
        "ChatCompletion": s.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        "AdapterResult": s.post("/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}),
        "Response": s.post("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
        "Message": s.post("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
        "MessageError": s.post("/v1/messages", {}),
        "Models": s.get("/v1/models"),
        "Error": s.post("/generate", {}),
    }
    for name, answer in found.items():
        assert set(schemas[name]["properties"]) <= set(answer.json()), name
    assert set(schemas["Generated"]["properties"]["meta_info"]["properties"]) <= set(
        found["Generated"].json()["meta_info"]
    )


@pytest.mark.parametrize(
    ("path", "method", "keys"),
    [
        ("/generate", "post", ["apiKey"]),
        ("/load_lora_adapter", "post", ["adminKey"]),
        ("/start_profile", "post", ["adminKey"]),
        ("/metrics", "get", ["metricsKey"]),
        ("/health", "get", []),
    ],
)
def test_who_needs_which_key(document, path, method, keys):
    security = document["paths"][path][method].get("security", [])
    assert [key for option in security for key in option] == keys
    assert set(keys) <= set(document["components"]["securitySchemes"])
