"""`/classify` and `/v1/classify` on the wire: vLLM's form and SGLang's, heads that are there or not."""

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer

from multilora.front.classification import sigmoid
from multilora.params import ClassifierSettings

TOKENIZER = byte_level_tokenizer()
PEERS = json.loads((Path(__file__).parents[2] / "data" / "peer_fields.json").read_text())
HELLO = [{"role": "user", "content": "hi"}]
SCORES = [0.5, 2.0, -1.0]
CHANCES = np.exp(SCORES) / np.exp(SCORES).sum()


class Classifier(FakeEngineClient):
    """With a head of three labels."""

    def __init__(self, **ready: Any):
        super().__init__(vocab_size=320)
        settings = ClassifierSettings(labels=("bad", "good", "odd"))
        fields = {"classifier": settings, "generates": False, "pad_token_id": 9} | ready
        self.ready = msgspec.structs.replace(self.ready, **fields)

    def pooled(self, message: Any) -> bytes:
        return struct.pack("<3f", *SCORES)


@pytest.fixture
def server() -> LocalServer:
    return LocalServer(Classifier(), TOKENIZER)


@pytest.mark.parametrize("route", ["/classify", "/v1/classify"])
def test_vllms_form(server: LocalServer, route: str) -> None:
    found = server.post(route, {"input": ["ab", "c"], "model": "base"}).json()
    assert found["id"].startswith("classify-")
    assert (found["object"], found["model"]) == ("list", "base")
    assert [(item["index"], item["label"], item["num_classes"]) for item in found["data"]] == [
        (0, "good", 3),
        (1, "good", 3),
    ]
    np.testing.assert_allclose(found["data"][0]["probs"], CHANCES, rtol=1e-6)
    assert found["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(text)) for text in ("ab", "c"))
    assert server.client.submitted[0].pooling.scores
    raw = server.post(route, {"messages": HELLO, "use_activation": False}).json()
    assert raw["data"][0]["probs"] == SCORES


def test_sglangs_native_form(server: LocalServer) -> None:
    one = server.post("/classify", {"text": "ab"}).json()
    assert one["embedding"] == SCORES
    assert one["meta_info"]["prompt_tokens"] == len(TOKENIZER.encode("ab"))
    several = server.post("/classify", {"input_ids": [[5], [6, 7]]}).json()
    assert [item["meta_info"]["prompt_tokens"] for item in several] == [1, 2]


def test_padding_behind_a_text_is_not_read(server: LocalServer) -> None:
    server.post("/classify", {"input": [5, 9, 6, 9, 9]})
    assert server.client.submitted[-1].input_ids == [5, 9, 6]


def test_one_label_and_another_problem() -> None:
    settings = ClassifierSettings(labels=("a", "b", "c"), problem_type="multi_label_classification")
    found = LocalServer(Classifier(classifier=settings), TOKENIZER).post("/classify", {"input": "x"}).json()
    np.testing.assert_allclose(found["data"][0]["probs"], sigmoid(np.array(SCORES, np.float32)), rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": "x", "text": "x"}, "input"),
        ({"text": "x", "input_ids": [5]}, "text"),
        ({"text": "x", "use_activation": True}, "use_activation"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": "x", "lora_path": "nope"}, "lora_path"),
    ],
)
def test_bad_input(server: LocalServer, body: dict[str, Any], param: str) -> None:
    answer = server.post("/classify", body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 0}}),
    ],
)
def test_a_classifier_generates_nothing(server: LocalServer, route: str, body: dict[str, Any]) -> None:
    answer = server.post(route, body)
    assert (answer.status, answer.error["param"]) == (400, "model")
    assert "no language-model head" in answer.error["message"]
    assert server.post("/v1/embeddings", {"input": "x", "dimensions": 3}).status == 200
    assert len(server.client.submitted) == 1
    assert server.get("/health_generate").status == 200
    assert server.get("/model_info").json()["is_generation"] is False


def test_a_model_without_a_head_classifies_nothing() -> None:
    found = LocalServer(FakeEngineClient(vocab_size=320), TOKENIZER)
    for body in ({"input": "x"}, {"text": "x"}):
        answer = found.post("/classify", body)
        assert (answer.status, answer.error["param"]) == (400, "model")
        assert "classification head" in answer.error["message"]


@pytest.mark.parametrize("body", [b for b in PEERS["bodies"] if b["route"] == "/classify"], ids=lambda b: b["class"])
def test_bodies_of_the_peers_at_their_defaults(server: LocalServer, body: dict[str, Any]) -> None:
    optional = {name: facts for name, facts in body["fields"].items() if not facts.get("required")}
    defaults = {name: facts["default"] for name, facts in optional.items() if "default" in facts}
    plain = server.post("/classify", {"input": "x"}).json()["data"]
    for fields in (defaults, dict.fromkeys(optional)):
        assert server.post("/classify", fields | {"input": "x"}).json()["data"] == plain
