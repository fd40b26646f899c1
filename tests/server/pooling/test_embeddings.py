"""`/v1/embeddings` and `/encode` on the wire: both peers' fields, adapters, refusals; numbers are a fake engine's.

Covers `pooling/bodies.py` and `pooling/reading.py` too.
"""

import asyncio
import base64
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
PEERS = json.loads((Path(__file__).parents[2] / "data" / "peer_fields.json").read_text())
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(tmp_path: Path) -> LocalServer:
    """With adapters a and b."""
    found = LocalServer(FakeEngineClient(vocab_size=320), TOKENIZER)
    for name in "ab":
        assert found.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(tmp_path)}).status == 200
    return found


def embed(server: LocalServer, **body: Any) -> dict[str, Any]:
    answer = server.post("/v1/embeddings", body)
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def asked(server: LocalServer) -> Any:
    return server.client.submitted[-1]


def test_an_answer(server: LocalServer) -> None:
    found = embed(server, input="hello", model="a")
    ids = TOKENIZER.encode("hello")
    assert asked(server).input_ids == ids
    assert asked(server).pooling.method == "last"
    assert (asked(server).sampling.max_new_tokens, len(asked(server).adapters)) == (0, 1)
    assert found["id"].startswith("embd-")
    assert (found["object"], found["model"]) == ("list", "a")
    counts = found["usage"]
    assert (counts["prompt_tokens"], counts["total_tokens"], counts["completion_tokens"]) == (len(ids), len(ids), 0)
    assert counts["prompt_tokens_details"] == {"cached_tokens": 1}
    assert found["metadata"]["lora_version"] is not None
    [item] = found["data"]
    assert (item["object"], item["index"], len(item["embedding"])) == ("embedding", 0, 64)
    assert math.hypot(*item["embedding"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("ab", [TOKENIZER.encode("ab")]),
        (["ab", "c"], [TOKENIZER.encode("ab"), TOKENIZER.encode("c")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_forms_of_input(server: LocalServer, given: Any, ids: list[list[int]]) -> None:
    found = embed(server, input=given)
    assert [item["index"] for item in found["data"]] == list(range(len(ids)))
    assert [message.input_ids for message in server.client.submitted] == ids
    assert found["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_numbers_as_base64(server: LocalServer) -> None:
    plain = embed(server, input="ab", encoding_format="float")["data"][0]["embedding"]
    coded = embed(server, input="ab", encoding_format="base64")["data"][0]["embedding"]
    assert list(struct.unpack("<64f", base64.b64decode(coded))) == plain


def test_dimensions_and_length(server: LocalServer) -> None:
    raw = embed(server, input="ab", use_activation=False)["data"][0]["embedding"]
    assert raw == list(struct.unpack("<64f", server.client.pooled(asked(server))))
    cut = embed(server, input="ab", dimensions=5)["data"][0]["embedding"]
    assert cut == pytest.approx([x / math.hypot(*raw[:5]) for x in raw[:5]])


def test_adapters(server: LocalServer) -> None:
    base = server.driver.front.config.model_name
    for fields in ({"model": "b"}, {"model": f"{base}:b"}, {"lora_path": "b"}, {"lora_path": ["b", "b"]}):
        embed(server, input=["x", "y"], **fields)
        assert len({message.adapters for message in server.client.submitted[-2:]} - {()}) == 1
    embed(server, input=["x", "y", "z"], lora_path=["a", None, "b"])
    first, second, third = (message.adapters for message in server.client.submitted[-3:])
    assert second == ()
    assert len({first, second, third}) == 3


def test_a_conversation(server: LocalServer) -> None:
    embed(server, messages=HELLO)
    answered = TOKENIZER.encode_chat(HELLO)
    assert asked(server).input_ids == TOKENIZER.encode_chat(HELLO, add_generation_prompt=False)
    embed(server, messages=HELLO, add_generation_prompt=True)
    assert asked(server).input_ids == answered


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(3)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(3)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, slice(-3, None)),
        ({"truncate_prompt_tokens": -1}, slice(256)),
    ],
)
def test_truncation(server: LocalServer, fields: dict[str, Any], kept: slice) -> None:
    for given in ("abc " * 200, [5 + i % 200 for i in range(300)]):
        embed(server, input=given, **fields)
        ids = TOKENIZER.encode(given) if isinstance(given, str) else given
        assert asked(server).input_ids == ids[kept]
    embed(server, input="ab", **fields)
    assert asked(server).input_ids == TOKENIZER.encode("ab")[kept]


def test_without_special_tokens(server: LocalServer) -> None:
    embed(server, input="ab", add_special_tokens=False)
    assert asked(server).input_ids == TOKENIZER.encode("ab", add_special_tokens=False)


def test_what_travels_with_a_text(server: LocalServer) -> None:
    embed(server, input=["x", "y"], rid="mine", timeout=5, cache_salt="s", user="me")
    first, second = server.client.submitted
    assert [message.rid.partition("@")[0] for message in (first, second)] == ["mine#0", "mine#1"]
    assert first.deadline is not None
    assert "s" in first.salt
    embed(server, input="x", rid="mine")
    assert asked(server).rid.startswith("mine@")


def test_many_numbers_are_written_on_a_thread(server: LocalServer) -> None:
    found = embed(server, input=[[5 + i] for i in range(300)])
    assert [item["index"] for item in found["data"]] == list(range(300))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": "x", "messages": HELLO}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [5, "x"]}, "input"),
        ({"input": [5, -1]}, "input"),
        ({"input": [5, 320]}, "input"),
        ({"input": 5}, "input"),
        ({"input": "x", "encoding_format": "bytes"}, "encoding_format"),
        ({"input": "x", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": "x", "dimensions": 65}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 1.5}, "dimensions"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": 257}, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": 5, "truncation_side": "up"}, "truncation_side"),
        ({"input": "a" * (1 << 20) + "a", "truncate_prompt_tokens": 5}, "input"),
        ({"input": "x", "padding": "max_length"}, "padding"),
        ({"input": "x", "lora_path": "nope"}, "lora_path"),
        ({"input": ["x", "y"], "lora_path": ["a"]}, "lora_path"),
        ({"input": ["x", "y"], "rid": ["a"]}, "rid"),
        ({"input": "x", "priority": 1 << 63}, "priority"),
        ({"input": "x", "timeout": -1}, "timeout"),
        ({"input": "x", "nobody_knows_this": 1}, "nobody_knows_this"),
        ({"input": "x", "temperature": 0.5}, "temperature"),
    ],
)
def test_bad_input(server: LocalServer, body: dict[str, Any], param: str) -> None:
    answer = server.post("/v1/embeddings", body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.text
    assert server.client.submitted == []


def test_unknown_models_and_long_inputs(server: LocalServer) -> None:
    answer = server.post("/v1/embeddings", {"input": "x", "model": "nope"})
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    answer = server.post("/v1/embeddings", {"input": [5] * 257})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "context_length_exceeded", "input")
    assert "256" in answer.error["message"]
    assert server.post("/v1/embeddings", {"input": [5] * 256}).status == 200


ROUTES = {"/v1/embeddings": {"EmbeddingChatRequest": {"messages": HELLO}}}
PEER_BODIES = [body for body in PEERS["bodies"] if body["route"] in ROUTES]


@pytest.mark.parametrize("body", PEER_BODIES, ids=lambda body: f"{body['peer']}-{body['class']}")
def test_bodies_of_the_peers_at_their_defaults(server: LocalServer, body: dict[str, Any]) -> None:
    route = body["route"]
    required = ROUTES[route].get(body["class"], {"input": "x"})
    plain = server.post(route, required).json()["data"]
    optional = {name: facts for name, facts in body["fields"].items() if not facts.get("required")}
    defaults = {name: facts["default"] for name, facts in optional.items() if "default" in facts}
    for fields in (defaults, dict.fromkeys(optional)):
        answer = server.post(route, fields | required)
        assert answer.status == 200, answer.text
        assert answer.json()["data"] == plain


def test_sglangs_native_form(server: LocalServer) -> None:
    one = server.post("/encode", {"text": "ab", "lora_path": "a", "sampling_params": {"max_new_tokens": 8}}).json()
    assert len(one["embedding"]) == 64
    assert (one["meta_info"]["prompt_tokens"], one["meta_info"]["cached_tokens"]) == (len(TOKENIZER.encode("ab")), 1)
    several = server.post("/encode", {"input_ids": [[5, 6], [7]], "rid": ["x", "y"], "dimensions": 4}).json()
    assert [len(item["embedding"]) for item in several] == [4, 4]
    assert [item["meta_info"]["id"] for item in several] == ["x", "y"]
    for body, param in (
        ({}, "text"),
        ({"text": "a", "input_ids": [5]}, "text"),
        ({"text": "a", "dimensions": 99}, "dimensions"),
    ):
        answer = server.post("/encode", body)
        assert (answer.status, answer.error["param"]) == (400, param)


@pytest.mark.parametrize("how", ["hang up", "abort"])
def test_a_request_that_is_given_up(server: LocalServer, how: str) -> None:
    """Its texts are aborted, and nobody is told numbers."""

    async def scenario() -> None:
        server.client.gate.clear()
        call = server.connect("POST", "/v1/embeddings", {"input": ["x", "y"], "rid": "mine", "model": "a"})
        while len(server.client.submitted) < 2:
            await asyncio.sleep(0)
        if how == "hang up":
            call.hang_up()
            await call.answer()
        else:
            assert (await server.send("POST", "/abort_request", {"rid": "mine"})).status == 200
            answer = await call.answer()
            assert answer.status == 500
            assert "aborted" in answer.error["message"]
        assert len(server.client.aborted) == 2
        assert server.driver.front.in_flight == 0
        assert server.registry.num_requests(server.registry.current("a").version) == 0

    run(scenario())
