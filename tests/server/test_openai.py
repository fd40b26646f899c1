"""What the OpenAI routes share: which adapter answers, model lists, defaults, rids.

Covers `openai_bodies.py` too.
"""

import re

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer

from multilora.server.chat import ChatRequest
from multilora.server.completions import CompletionRequest

TOKENIZER = byte_level_tokenizer()


def answer_of(submit):
    return TOKENIZER.encode(f"v{submit.adapters[0][0] if submit.adapters else 0}")[1:]


def server(**config):
    client = FakeEngineClient(vocab_size=320, eos_token_ids=(1,), answer=answer_of)
    return LocalServer(client, TOKENIZER, **config)


def completion(s, **body):
    return s.post("/v1/completions", {"prompt": "x"} | body)


CHOICES = [
    ({"model": "base"}, "v0"),
    ({"model": "base:"}, "v0"),
    ({"model": "base:a"}, "v1"),
    ({"model": "a"}, "v1"),
    ({"model": "base", "lora_path": "b"}, "v2"),
    ({"model": "b", "lora_path": "b"}, "v2"),
    ({"model": "base", "lora_path": None}, "v0"),
    ({"model": "default"}, "v0"),
    ({"model": "default", "lora_path": "a"}, "v1"),
    ({"model": "org/c"}, "v3"),
    ({"model": "base:org/c"}, "v3"),
    ({"model": "base", "lora_path": "org/c"}, "v3"),
]


@pytest.mark.parametrize(("body", "text"), CHOICES)
def test_which_adapter_answers_and_model_is_echoed(body, text):
    s = server()
    s.load("a", "b", "org/c")
    answer = completion(s, **body)
    assert answer.json()["choices"][0]["text"] == text
    assert answer.json()["model"] == body["model"]
    chat = s.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]} | body)
    assert chat.json()["choices"][0]["message"]["content"] == text
    assert s.post("/generate", {"text": "x"} | body).json()["text"] == text


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": None, "lora_path": None}])
def test_without_a_model_the_base_answers_under_its_name(body):
    s = server()
    s.load("a")
    answer = completion(s, **body).json()
    assert (answer["choices"][0]["text"], answer["model"]) == ("v0", "base")
    frames = completion(s, **body, stream=True).frames
    assert {frame["model"] for frame in frames} == {"base"}
    chat = s.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]} | body).json()
    assert (chat["choices"][0]["message"]["content"], chat["model"]) == ("v0", "base")
    assert s.post("/generate", {"text": "x"} | body).json()["text"] == "v0"


@pytest.mark.parametrize("model", ["nope", "other:a", ""])
def test_a_native_request_for_another_model_is_refused(model):
    s = server()
    answer = s.post("/generate", {"text": "x", "model": model})
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert s.client.submitted == []


REFUSED = [
    ({"model": "nope"}, 404, "model_not_found"),
    ({"model": "other:a"}, 404, "model_not_found"),
    ({"model": ""}, 404, "model_not_found"),
    ({"model": "base:nope"}, 400, "UnknownAdapter"),
    ({"model": "base", "lora_path": "nope"}, 400, "UnknownAdapter"),
    ({"model": "a", "lora_path": "b"}, 400, "BadRequest"),
    ({"model": 5}, 400, "BadRequest"),
]


@pytest.mark.parametrize(("body", "status", "code"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_name_is_never_served_by_base(body, status, code, stream):
    s = server()
    s.load("a", "b")
    answer = completion(s, **body, stream=stream)
    assert answer.status == status
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["code"] == code
    assert s.client.submitted == []


def test_lora_path_may_be_a_list_for_a_list_of_prompts():
    s = server()
    s.load("a", "b")
    body = completion(s, model="base", prompt=["x", "y", "z"], lora_path=["b", None, "a"]).json()
    assert [c["text"] for c in body["choices"]] == ["v2", "v0", "v1"]
    assert completion(s, model="base", prompt=["x", "y"], lora_path=["b"]).error["param"] == "lora_path"


def test_lora_off():
    answer = completion(server(enable_lora=False), model="base:a")
    assert answer.status == 400
    assert "LoRA is not enabled" in answer.error["message"]


def test_models():
    s = server(model_path="/models/llama")
    s.load("a")
    data = s.get("/v1/models").json()["data"]
    assert [(m["id"], m["root"], m["parent"]) for m in data] == [
        ("base", "/models/llama", None),
        ("a", "/adapters/a", "base"),
    ]
    assert all(m["object"] == "model" and m["max_model_len"] == 256 for m in data)
    assert s.get("/v1/models/base").json() == data[0]
    assert s.get("/v1/models/a").json() == data[1]
    assert s.get("/v1/models/nope").status == 404


TOO_LONG = {
    "/generate": {"input_ids": [5] * 256},
    "/v1/completions": {"prompt": [5] * 256, "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x" * 300}]},
}


@pytest.mark.parametrize("route", TOO_LONG)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_look_for(route, stream):
    s = server()
    answer = s.post(route, TOO_LONG[route] | {"stream": stream})
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert answer.error["type"] == "invalid_request_error"
    words = r"This model's maximum context length is 256 tokens\. However, you requested (\d+) tokens"
    assert int(re.match(words, answer.error["message"])[1]) > 256
    assert s.client.submitted == []


def test_a_bare_path_is_a_name_with_slashes():
    from fakes.server_app import run

    s = server()
    run(s.load_from("/p/x", "/p/x"))
    assert s.get("/v1/models//p/x").json()["id"] == "/p/x"
    assert completion(s, model="base:/p/x").json()["choices"][0]["text"] == "v1"


def test_defaults_of_the_model_are_used_unless_switched_off_or_given():
    client = FakeEngineClient(vocab_size=320)
    s = LocalServer(client, TOKENIZER, {"temperature": 0.25, "top_p": 0.5})
    completion(s, model="base", top_p=0.75)
    assert (client.submitted[-1].sampling.temperature, client.submitted[-1].sampling.top_p) == (0.25, 0.75)
    s.post("/generate", {"text": "x"})
    assert client.submitted[-1].sampling.temperature == 1
    s = LocalServer(client, TOKENIZER, {"temperature": 0.25}, sampling_defaults="openai")
    completion(s, model="base")
    assert client.submitted[-1].sampling.temperature == 1


def test_every_sampling_field_reaches_the_engine():
    s = server()
    given = {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "stop_token_ids": [7],
        "ignore_eos": True,
        "logit_bias": {"5": 1.5},
    }
    answer = completion(s, model="base", seed=11, max_tokens=9, min_tokens=2, **given)
    assert answer.status == 200
    sampling = s.client.submitted[0].sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert (sampling.sampling_seed, sampling.max_new_tokens, sampling.min_new_tokens) == (11, 9, 2)


def test_the_rid_is_the_id():
    s = server()
    assert completion(s, model="base", rid="mine").json()["id"] == "mine"
    assert completion(s, model="base", rid="mine", n=2).json()["id"] == "mine"
    assert [m.rid.partition("@")[0] for m in s.client.submitted] == ["mine", "mine#0", "mine#1"]


def test_response_format():
    s = server()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}):
        assert completion(s, model="base", response_format=form).status == 200
        assert s.client.submitted[-1].grammar
    assert completion(s, model="base", response_format={"type": "text"}).status == 200
    assert s.client.submitted[-1].grammar is None
    for form in (
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "xml"},
        "x",
    ):
        answer = completion(s, model="base", response_format=form)
        assert (answer.status, answer.error["param"]) == (400, "response_format")
    both = completion(s, model="base", response_format={"type": "json_object"}, regex="a")
    assert both.status == 400


def test_openais_unused_fields_are_accepted_and_foreign_ones_in_effect_are_not():
    s = server()
    assert completion(s, model="base", user="me", store=False, metadata={"a": "b"}, service_tier="auto").status == 200
    answer = completion(s, model="base", temprature=1)
    assert answer.error["message"] == "temprature: not supported by this server; did you mean 'temperature'?"
    assert completion(s, model="base", suffix="x").error["param"] == "suffix"
    assert completion(s, model="base", suffix=None).status == 200


STREAMED = [
    {},
    {"n": 2},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"echo": True},
    {"logprobs": 1},
    {"return_token_ids": True},
    {"stop": ["never"]},
    {"model": '\x00 "\\u0000"'},
]


@pytest.mark.parametrize("body", STREAMED)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_frames_of_text_are_what_would_be_encoded_for_each(path, body, monkeypatch):
    """Text that JSON escapes, and pieces of characters, which make no frame at all."""
    ids = TOKENIZER.encode('a "q" \\ \n é 漢 \x00 \x7f ok')[1:]
    client = FakeEngineClient(vocab_size=320, eos_token_ids=(1,), answer=lambda _: ids)
    s = LocalServer(client, TOKENIZER)
    if "model" in body:
        s = LocalServer(client, TOKENIZER, served_model_name=body["model"])
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    chat = {"logprobs": True} if body.get("logprobs") and "chat" in path else {}
    whole = prompt | {"stream": True, "max_tokens": len(ids), "rid": "r"} | body | chat
    found = [_frames(s, path, whole)]
    for route in (CompletionRequest, ChatRequest):
        monkeypatch.setattr(route, "text_choice", lambda *_: None)
    found.append(_frames(s, path, whole))
    assert found[0] == found[1]
    assert len(found[0]) > 20


def _frames(s, path, body):
    answer = s.post(path, body)
    assert answer.status == 200, answer.text
    return re.sub(r'"created":\d+', "", answer.text).split("\n\n")
