"""Values that were answered with a 500, or that stalled others: each is 400 with the name of its field."""

import json
import time

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer


@pytest.fixture(scope="module")
def server() -> LocalServer:
    tokenizer = byte_level_tokenizer()
    server = LocalServer(FakeEngineClient(vocab_size=tokenizer.vocab_size), tokenizer)
    server.load("a")
    return server


def chat(**fields):
    return {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | fields


SAMPLING = {
    "a key of 5,000 digits": ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    "5,000 biases": ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    "a schema of 20,000": (
        {"json_schema": json.dumps({"properties": {f"{i}": {} for i in range(20_000)}})},
        "json_schema",
    ),
    "an enormous bias": ({"logit_bias": {"1": 1e300}}, "logit_bias"),
    "5,000 parentheses": ({"stop_regex": "(" * 5000 + "a" + ")" * 5000}, "stop_regex"),
    "a nested repetition": ({"stop_regex": "((a{1000}){1000}){1000}"}, "stop_regex"),
    "a backreference": ({"stop_regex": r"(a)\1"}, "stop_regex"),
    "nine expressions": ({"stop_regex": [f"a{i}" for i in range(9)]}, "stop_regex"),
    "a penalty that divides to infinity": ({"repetition_penalty": 1e-38}, "repetition_penalty"),
    "a temperature over fp32": ({"temperature": 3.5e38, "regex": "a"}, "temperature"),
    "10,000 stop strings": ({"stop": [f"s{i}" for i in range(10_000)]}, "stop"),
    "a long stop string": ({"stop": "a" * 10_000}, "stop"),
    "10,000 stop tokens": ({"stop_token_ids": list(range(10_000))}, "stop_token_ids"),
    "10,000 samples": ({"n": 10_000}, "n"),
    "an empty language": ({"regex": r"[^\s\S]"}, "regex"),
    "an endless grammar": ({"ebnf": 'root ::= "a" root'}, "ebnf"),
    "a deep schema": ({"json_schema": '{"items":' * 900 + "{}" + "}" * 900}, "json_schema"),
    "allOf": ({"json_schema": '{"allOf": [{"type": "object"}, {"required": ["a"]}]}'}, "json_schema"),
    "a remote reference": ({"json_schema": '{"$ref": "https://example.org/a.json"}'}, "json_schema"),
    "a grammar of 2 MB": ({"regex": "a" * 2_000_000}, "regex"),
}


@pytest.mark.parametrize(("sampling", "field"), SAMPLING.values(), ids=SAMPLING)
def test_sampling_parameters(server, sampling, field):
    start = time.process_time()
    answer = server.post("/generate", {"text": "a", "sampling_params": sampling})
    assert (answer.status, answer.error["param"]) == (400, field)
    assert len(answer.body) < 3000
    assert time.process_time() - start < 5


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_messages_without_end(server, path):
    answer = server.post(path, {"messages": [{"role": "user", "content": "a"}] * 9000})
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "at most 8192" in answer.error["message"] and len(answer.body) < 1000


@pytest.mark.parametrize(
    "name",
    ["add_generation_prompt", "tools", "messages", "self", "continue_final_message", "tokenize", "conversation"],
)
def test_template_arguments(server, name):
    answer = server.post("/v1/chat/completions", chat(chat_template_kwargs={name: 1}))
    assert answer.status == 400
    assert name in answer.error["message"]


def test_logprobs(server):
    wanted = {"return_logprob": True, "top_logprobs_num": 21}
    answer = server.post("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}} | wanted)
    assert (answer.status, answer.error["param"]) == (400, "top_logprobs_num")
    assert "must be 0 to 20 (--max-logprobs)" in answer.error["message"]
    answer = server.post("/v1/chat/completions", chat(logprobs=True, top_logprobs=21))
    assert (answer.status, answer.error["param"]) == (400, "top_logprobs")


def test_many_prompts(server):
    """Reading 50,000 of them before they were refused took seconds."""
    start = time.process_time()
    for path, field in (("/generate", "text"), ("/v1/completions", "prompt")):
        answer = server.post(path, {field: ["a"] * 50_000})
        assert (answer.status, answer.error["param"]) == (400, field)
        assert "at most 4096 are taken" in answer.error["message"]
    assert time.process_time() - start < 1


def test_weights(server):
    body = {"text": "a", "sampling_params": {"max_new_tokens": 1}, "lora_path": [{"name": "a", "weight": 3e38}]}
    answer = server.post("/generate", body)
    assert (answer.status, answer.error["param"]) == (400, "lora_path")


def test_a_prompt_that_cannot_fit_is_not_tokenized(server, monkeypatch):
    monkeypatch.setattr("multilora.front.tokenizer.Tokenizer._encode", lambda *_, **__: pytest.fail("tokenized"))
    text = "word " * 400_000
    for path, body, field in (
        ("/generate", {"text": text}, "text"),
        ("/v1/completions", {"prompt": text}, "prompt"),
        ("/v1/chat/completions", chat(messages=[{"role": "user", "content": text}]), "messages"),
        ("/v1/responses", {"input": text}, "input"),
        ("/v1/responses", {"input": "a", "instructions": text}, "input"),
    ):
        answer = server.post(path, body)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert answer.error["param"] == field
        assert "maximum context length is 256 tokens. However, you requested at least" in answer.error["message"]
