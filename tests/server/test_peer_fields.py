"""Bodies as clients of SGLang and vLLM send them, through HTTP: each field of both peers at its default, or null."""

import json
from pathlib import Path

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer

PEERS = json.loads((Path(__file__).parents[1] / "data" / "peer_fields.json").read_text())
TOKENIZER = byte_level_tokenizer()
COMPUTED = {"request_id": "cmpl-1", "output_kind": 0}  # made at run time, or an enumeration's number
REQUIRED = {
    "/generate": {"text": "x"},
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8},
}
BODIES = [body for body in PEERS["bodies"] if body["route"] in {*REQUIRED, "sampling_params"}]
FIELDS = [
    pytest.param(body["route"], name, COMPUTED[name] if facts.get("computed") else facts["default"], id=name_of)
    for body in BODIES
    for name, facts in body["fields"].items()
    if not facts.get("required")
    for name_of in [f"{body['peer']}-{body['route']}-{name}"]
]


@pytest.fixture(scope="module")
def server():
    client = FakeEngineClient(vocab_size=320, eos_token_ids=(1,), answer=lambda m: [*TOKENIZER.encode("v")[1:], 1])
    return LocalServer(client, TOKENIZER)


def send(server, route, fields):
    """The answer, and what the engine was asked for, without the request's own key."""
    server.client.submitted.clear()
    if route == "sampling_params":
        route, fields = "/generate", {"sampling_params": fields}
    answer = server.post(route, fields | REQUIRED[route])
    assert answer.status == 200, answer.text
    (submit,) = server.client.submitted
    engine_sees = (submit.input_ids, submit.sampling, submit.adapters, submit.return_logprob, submit.prompt_logprobs)
    return answer.json(), (*engine_sees, submit.salt, submit.priority, submit.logprobs_mode)


@pytest.fixture(scope="module")
def plain(server):
    """What the engine is asked for by a body without any optional field."""
    return {route: send(server, route, {})[1] for route in [*REQUIRED, "sampling_params"]}


@pytest.mark.parametrize(("route", "name", "default"), FIELDS)
def test_every_field_of_the_peers_is_served_at_its_default_and_as_null(server, plain, route, name, default):
    send(server, route, {name: default})
    assert send(server, route, {name: None})[1] == plain[route]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: f"{body['peer']}-{body['route']}")
def test_a_body_with_every_field_at_its_default_or_null_is_served(server, plain, body):
    optional = {name: facts for name, facts in body["fields"].items() if not facts.get("required")}
    send(server, body["route"], {name: facts["default"] for name, facts in optional.items() if "default" in facts})
    assert send(server, body["route"], dict.fromkeys(optional))[1] == plain[body["route"]]


def test_a_null_in_a_required_field_is_a_missing_field(server):
    assert server.post("/v1/completions", {"prompt": None}).error["message"] == "prompt: this field is required"


@pytest.mark.parametrize("route", REQUIRED)
def test_a_foreign_field_in_effect_is_refused_by_name(server, route):
    for fields in ({"return_hidden_states": True}, {"allowed_token_ids": [3]}, {"nobody_knows_this": 1}):
        server.client.submitted.clear()
        answer = server.post(route, REQUIRED[route] | fields)
        named = answer.error.get("param") or answer.error["message"].partition(":")[0]  # Anthropic's have no param
        assert (answer.status, named) == (400, *fields)
        assert server.client.submitted == []


def test_foreign_sampling_parameters(server, plain):
    assert send(server, "sampling_params", {"extra_args": None, "best_of": 1})[1] == plain["sampling_params"]
    for params in ({"extra_args": {"a": 1}}, [{"best_of": 2}]):
        text = "x" if isinstance(params, dict) else ["x"]
        answer = server.post("/generate", {"text": text, "sampling_params": params})
        assert answer.status == 400
        assert answer.error["param"] in ("extra_args", "best_of")


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_objects_within_bodies(server, route):
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}}}
    usage = {"include_usage": True, "include_obfuscation": False}
    body = REQUIRED[route] | {"stream": True, "stream_options": usage, "response_format": form}
    assert server.post(route, body).status == 200
    answer = server.post(route, body | {"response_format": form | {"odd": 1}})
    assert answer.error["param"] == "response_format"
    assert answer.error["message"] == "response_format.odd: not supported by this server"
    assert server.post(route, body | {"stream_options": {"odd": 1}}).error["param"] == "stream_options"


def test_numbers_without_a_fraction_are_integers(server):
    for route, name in (("/v1/completions", "max_tokens"), ("/v1/chat/completions", "max_tokens")):
        assert send(server, route, {name: 16.0})[1][1].max_new_tokens == 16
        answer = server.post(route, REQUIRED[route] | {name: 16.5})
        assert (answer.status, answer.error["param"]) == (400, name)
    params = {"max_new_tokens": 16.0, "top_k": 4.0, "sampling_seed": 7.0}
    sampling = send(server, "sampling_params", params)[1][1]
    assert (sampling.max_new_tokens, sampling.top_k, sampling.sampling_seed) == (16, 4, 7)
    answer = server.post("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 1.5}})
    assert (answer.status, answer.error["param"]) == (400, "max_new_tokens")


@pytest.mark.parametrize("route", ["sampling_params", "/v1/completions", "/v1/chat/completions"])
def test_values_that_mean_unset(server, plain, route):
    grammars = dict.fromkeys(("json_schema", "regex", "ebnf"), "")
    assert send(server, route, {"top_k": 0} | grammars)[1] == plain[route]
    if route != "sampling_params":
        assert send(server, route, {"cache_salt": "", "extra_key": "", "priority": 0})[1] == plain[route]


def test_the_reasoning_effort_goes_to_the_chat_template(server, plain):
    assert send(server, "/v1/chat/completions", {"reasoning_effort": "low"})[1] == plain["/v1/chat/completions"]
