"""/tokenize and /detokenize: both dialects, what they refuse, and whose vocabulary."""

import json
from pathlib import Path

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
HELLO = [{"role": "user", "content": "hi"}]
PEERS = json.loads((Path(__file__).parents[1] / "data" / "peer_fields.json").read_text())
BODIES = [body for body in PEERS["bodies"] if body["route"] in ("/tokenize", "/detokenize")]
REQUIRED = {
    "TokenizeRequest": [{"prompt": "a"}, {"messages": HELLO}],
    "TokenizeCompletionRequest": [{"prompt": "a"}],
    "TokenizeChatRequest": [{"messages": HELLO}],
    "DetokenizeRequest": [{"tokens": [5]}],
}


def server(tokenizer=TOKENIZER):
    return LocalServer(FakeEngineClient(vocab_size=320), tokenizer)


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_prompt_there_and_back(prefix):
    s = server()
    ids = TOKENIZER.encode("hello 漢")
    answer = s.post(f"{prefix}/tokenize", {"prompt": "hello 漢"}).json()
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 256, "token_strs": None}
    assert s.post(f"{prefix}/detokenize", {"tokens": ids}).json() == {"text": "hello 漢", "prompt": "<s>hello 漢"}
    for skip in (True, False):
        text = TOKENIZER.decode(ids, skip_special_tokens=skip)
        answer = s.post(f"{prefix}/detokenize", {"tokens": ids, "skip_special_tokens": skip}).json()
        assert answer == {"text": text, "prompt": text}


def test_several_at_once():
    s = server()
    lists = [TOKENIZER.encode(text) for text in ("a", "bcd")]
    answer = s.post("/tokenize", {"prompt": ["a", "bcd"]}).json()
    assert (answer["tokens"], answer["count"]) == (lists, [len(ids) for ids in lists])
    assert s.post("/detokenize", {"tokens": lists}).json()["text"] == ["a", "bcd"]
    assert s.post("/tokenize", {"prompt": []}).json()["tokens"] == []
    assert s.post("/detokenize", {"tokens": []}).json()["text"] == ""


def test_without_special_tokens_and_with_the_tokens_as_text():
    answer = server().post("/tokenize", {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True})
    assert answer.json()["tokens"] == TOKENIZER.encode("ab")[1:]
    assert answer.json()["token_strs"] == ["a", "b"]


def test_messages_are_what_a_chat_sends_to_the_engine():
    s = server()
    for options in ({}, {"add_generation_prompt": False}):
        s.post("/v1/chat/completions", {"messages": HELLO} | options)
        ids = s.post("/tokenize", {"messages": HELLO} | options).json()["tokens"]
        assert ids == s.client.submitted[-1].input_ids


@pytest.mark.parametrize("body", BODIES, ids=lambda body: f"{body['peer']}-{body['class']}")
def test_every_field_of_the_peers_is_served_at_its_default_and_as_null(body):
    s = server()
    optional = {name: facts for name, facts in body["fields"].items() if not facts.get("required")}
    for required in REQUIRED[body["class"]]:
        plain = s.post(body["route"], required).json()
        for name, facts in optional.items():
            assert s.post(body["route"], {name: facts["default"]} | required).status == 200, name
        assert s.post(body["route"], dict.fromkeys(optional) | required).json() == plain


REFUSED = {
    "neither": ("/tokenize", {}, 400, "prompt"),
    "both": ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt"),
    "no messages": ("/tokenize", {"messages": []}, 400, "messages"),
    "ids as a prompt": ("/tokenize", {"prompt": [5]}, 400, "prompt"),
    "another model": ("/tokenize", {"prompt": "a", "model": "nope"}, 404, "model"),
    "a template": ("/tokenize", {"messages": HELLO, "chat_template": "x"}, 400, "chat_template"),
    "no tokens": ("/detokenize", {}, 400, "tokens"),
    "text": ("/detokenize", {"tokens": "a"}, 400, "tokens"),
    "outside": ("/detokenize", {"tokens": [5, 320]}, 400, "tokens"),
    "negative": ("/detokenize", {"tokens": [[5], [-1]]}, 400, "tokens"),
    "model of ids": ("/detokenize", {"tokens": [5], "model": "base:nope"}, 400, "model"),
}


@pytest.mark.parametrize(("route", "body", "status", "param"), REFUSED.values(), ids=REFUSED)
def test_refused(route, body, status, param):
    answer = server().post(route, body)
    assert (answer.status, answer.error["param"]) == (status, param)


def test_without_a_tokenizer():
    s = server(tokenizer=None)
    for route, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        answer = s.post(route, body)
        assert answer.status == 400
        assert "--skip-tokenizer-init" in answer.error["message"]
