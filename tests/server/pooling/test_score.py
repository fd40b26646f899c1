"""`/v1/score` and `/v1/rerank` on the wire, over a fake engine with and without a head."""

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
TEXTS = ["a cat", "b", "some longer text"]


class Judge(FakeEngineClient):
    """With a head of one label, whose score is the number of tokens."""

    def __init__(self, labels: int = 1):
        super().__init__(vocab_size=320)
        settings = ClassifierSettings(labels=tuple(map(str, range(labels))))
        self.ready = msgspec.structs.replace(self.ready, classifier=settings, generates=False)

    def pooled(self, message: Any) -> bytes:
        return struct.pack("<f", len(message.input_ids) / 10)


@pytest.fixture
def judge() -> LocalServer:
    return LocalServer(Judge(), TOKENIZER)


@pytest.fixture
def plain() -> LocalServer:
    return LocalServer(FakeEngineClient(vocab_size=320), TOKENIZER)


def lengths(query: str) -> list[int]:
    return [len(TOKENIZER.hf(query, text)["input_ids"]) for text in TEXTS]


@pytest.mark.parametrize("route", ["/v1/score", "/score"])
@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
def test_scores_by_a_head(judge: LocalServer, route: str, names: tuple[str, str]) -> None:
    found = judge.post(route, {names[0]: "q", names[1]: TEXTS, "model": "base"}).json()
    assert [m.input_ids for m in judge.client.submitted] == [TOKENIZER.hf("q", text)["input_ids"] for text in TEXTS]
    assert (found["object"], found["model"]) == ("list", "base")
    assert [(item["index"], item["object"]) for item in found["data"]] == [(i, "score") for i in range(3)]
    expected = np.array(lengths("q"), np.float32) / 10
    np.testing.assert_allclose([item["score"] for item in found["data"]], sigmoid(expected), rtol=1e-6)
    raw = judge.post(route, {names[0]: ["q"] * 3, names[1]: TEXTS, "use_activation": False}).json()
    np.testing.assert_allclose([item["score"] for item in raw["data"]], expected, rtol=1e-6)
    assert found["usage"]["prompt_tokens"] == sum(lengths("q"))


def test_scores_by_embeddings(plain: LocalServer) -> None:
    """Each text is read once."""
    found = plain.post("/v1/score", {"text_1": "b", "text_2": TEXTS}).json()
    assert [m.input_ids for m in plain.client.submitted] == [TOKENIZER.encode(text) for text in ("b", *TEXTS)]
    assert found["data"][1]["score"] == pytest.approx(1)
    assert all(-1 <= item["score"] <= 1 for item in found["data"])


@pytest.mark.parametrize("route", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_ranking(judge: LocalServer, route: str) -> None:
    found = judge.post(route, {"query": "q", "documents": TEXTS}).json()
    best = sorted(range(3), key=lambda i: -lengths("q")[i])
    assert [item["index"] for item in found["results"]] == best
    assert [item["document"]["text"] for item in found["results"]] == [TEXTS[i] for i in best]
    scores = [item["relevance_score"] for item in found["results"]]
    assert scores == sorted(scores, reverse=True)
    documents = [{"text": text} for text in TEXTS]
    cut = judge.post(route, {"query": "q", "documents": documents, "top_n": 1, "return_documents": False}).json()
    assert cut["results"] == [{"index": best[0], "relevance_score": scores[0]}]


def test_truncation_takes_from_the_longer_text(judge: LocalServer) -> None:
    body = {"text_1": "ab", "text_2": ["long " * 200], "truncate_prompt_tokens": 12}
    assert judge.post("/v1/score", body).status == 200
    expected = TOKENIZER.hf("ab", "long " * 200, truncation=True, max_length=12)["input_ids"]
    TOKENIZER.hf.backend_tokenizer.no_truncation()
    assert judge.client.submitted[-1].input_ids == expected
    answer = judge.post("/v1/score", {"text_1": "ab", "text_2": ["long " * 200]})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "context_length_exceeded", "text_2")


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/score", {}, "text_1"),
        ("/v1/score", {"text_1": "x"}, "text_1"),
        ("/v1/score", {"text_1": "x", "documents": "y"}, "text_1"),
        ("/v1/score", {"text_1": ["x", "y"], "text_2": ["x", "y", "z"]}, "text_1"),
        ("/v1/score", {"text_1": "x", "text_2": []}, "text_2"),
        ("/v1/score", {"queries": "x", "items": "y", "label_token_ids": [3]}, "label_token_ids"),
        ("/v1/score", {"text_1": "x", "text_2": "y", "model": "base:nope"}, "model"),
        ("/v1/score", {"text_1": "x", "text_2": "y", "lora_path": ["a", "b"]}, "lora_path"),
        ("/v1/rerank", {"documents": ["x"]}, "query"),
        ("/v1/rerank", {"query": "x", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "x", "documents": [3]}, "documents"),
        ("/v1/rerank", {"query": "x", "documents": ["y"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "x", "documents": ["y"], "instruct": "z"}, "instruct"),
    ],
)
def test_bad_input(judge: LocalServer, route: str, body: dict[str, Any], param: str) -> None:
    answer = judge.post(route, body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.text
    assert judge.client.submitted == []


def test_a_head_of_several_labels_is_refused() -> None:
    answer = LocalServer(Judge(labels=3), TOKENIZER).post("/v1/score", {"text_1": "x", "text_2": "y"})
    assert (answer.status, answer.error["param"]) == (400, "model")
    assert "has 3" in answer.error["message"]


@pytest.mark.parametrize(
    "body",
    [b for b in PEERS["bodies"] if b["route"] in ("/v1/score", "/v1/rerank")],
    ids=lambda b: f"{b['peer']}-{b['class']}",
)
def test_bodies_of_the_peers_at_their_defaults(judge: LocalServer, body: dict[str, Any]) -> None:
    required = (
        {"queries": "q", "documents": TEXTS} if body["route"] == "/v1/score" else {"query": "q", "documents": TEXTS}
    )
    optional = {name: facts for name, facts in body["fields"].items() if not facts.get("required")}
    defaults = {name: facts["default"] for name, facts in optional.items() if "default" in facts}
    for fields in (defaults, dict.fromkeys(optional)):
        answer = judge.post(body["route"], fields | required)
        assert answer.status == 200, answer.text
