"""--max-response-bytes: an answer that would be longer gets its one ending, on each route, whole and streamed."""

import json
import math
import re
from typing import Any

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer
from starlette.responses import Response

from multilora.errors import ResponseTooLarge
from multilora.server.response_bytes import ResponseBudget

TOKENIZER = byte_level_tokenizer()
TOKENS = 3000
LIMIT = 6000
ENDING = 600
"""Bytes of an error and of what closes a stream; for `/v1/messages` also of the events of the answer's beginning."""

TIMES = re.compile(rb"\d+\.\d+(e-?\d+)?|\d+e-\d+")

LOGPROBS = {"return_logprob": True, "top_logprobs_num": 3}
HELLO = [{"role": "user", "content": "hi"}]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("/generate", {"text": "hi", "sampling_params": {"max_new_tokens": TOKENS}} | LOGPROBS),
    "native, several": (
        "/generate",
        {"text": ["hi", "ho"], "sampling_params": {"max_new_tokens": TOKENS, "n": 2}} | LOGPROBS,
    ),
    "completions": ("/v1/completions", {"prompt": "hi", "max_tokens": TOKENS, "logprobs": 3}),
    "chat": (
        "/v1/chat/completions",
        {"messages": HELLO, "max_tokens": TOKENS, "logprobs": True, "top_logprobs": 3, "n": 2},
    ),
    "tokens": (
        "/inference/v1/generate",
        {"token_ids": [5, 6], "sampling_params": {"max_tokens": TOKENS, "logprobs": 3}},
    ),
    "messages": ("/v1/messages", {"model": "base", "max_tokens": TOKENS, "messages": HELLO}),
    "responses": (
        "/v1/responses",
        {
            "input": "hi",
            "max_output_tokens": TOKENS,
            "top_logprobs": 3,
            "include": ["message.output_text.logprobs"],
        },
    ),
}


def server(limit: int = LIMIT, tokens: int = TOKENS) -> LocalServer:
    letters = TOKENIZER.encode("ab")[1:]
    client = FakeEngineClient(
        vocab_size=320, context_length=1 << 15, eos_token_ids=(1,), answer=lambda _: letters * (tokens // 2)
    )
    return LocalServer(client, TOKENIZER, max_response_bytes=limit, reasoning_parser=None)


def generated(s: LocalServer) -> int:
    return max(s.client.delivered.values())


@pytest.mark.parametrize("name", BODIES)
def test_an_answer_in_one_piece_is_refused(name):
    path, body = BODIES[name]
    s = server(1500)
    answer = s.post(path, body)
    assert answer.status == 400
    assert "over 1500 bytes (--max-response-bytes)" in answer.error["message"]
    assert s.driver.front.in_flight == 0
    if name != "messages":
        assert answer.error["code"] == "ResponseTooLarge"


@pytest.mark.parametrize("name", BODIES)
def test_what_cannot_fit_is_not_generated_to_the_end(name):
    path, body = BODIES[name]
    s = server(1500)
    s.post(path, body)
    assert s.client.aborted
    assert generated(s) <= TOKENS / 2 + 1  # of which each has at least one letter


@pytest.mark.parametrize("name", BODIES)
def test_a_stream_ends_with_its_error(name):
    path, body = BODIES[name]
    s = server()
    answer = s.post(path, body | {"stream": True})
    assert answer.status == 200
    assert LIMIT / 2 < len(answer.body) < LIMIT + ENDING
    events = [event.rpartition("data: ")[2] for event in answer.text.split("\n\n") if event]
    if path not in ("/v1/messages", "/v1/responses"):
        assert events.pop() == "[DONE]"
    error = json.loads(events[-1])
    assert "over 6000 bytes (--max-response-bytes)" in json.dumps(error)
    assert "ResponseTooLarge" in json.dumps(error) or path == "/v1/messages"
    assert all("max-response-bytes" not in event for event in events[:-1])
    assert s.client.aborted and generated(s) < TOKENS
    assert s.driver.front.in_flight == 0


def test_the_first_frame_can_be_too_much():
    path, body = BODIES["native"]
    body = body | {"input_ids": list(range(5, 300)), "logprob_start_len": 0, "stream": True}
    del body["text"]
    answer = server(2000).post(path, body)
    assert (answer.status, answer.error["code"]) == (400, "ResponseTooLarge")


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_what_fits_is_sent(name, stream):
    path, body = BODIES[name]
    s, unbound = server(100_000, tokens=20), server(1 << 40, tokens=20)
    answers = [one.post(path, body | {"stream": stream}) for one in (s, unbound)]
    assert [answer.status for answer in answers] == [200, 200]
    lengths = [len(TIMES.sub(b"", answer.body)) for answer in answers]  # a time has as many digits as it likes
    assert math.isclose(*lengths, abs_tol=100)
    assert "ResponseTooLarge" not in answers[0].text


def test_logprobs_of_a_long_prompt():
    body = {"prompt": list(range(5, 300)), "prompt_logprobs": 3, "max_tokens": 2}
    assert server(1 << 20).post("/v1/completions", body).status == 200
    s = server(10_000)
    assert s.post("/v1/completions", body).error["code"] == "ResponseTooLarge"
    assert generated(s) == 1


def test_embeddings():
    body = {"input": ["hi", "ho"]}
    assert server(10_000).post("/v1/embeddings", body).status == 200
    assert server(500).post("/v1/embeddings", body).error["code"] == "ResponseTooLarge"


def test_a_response_that_was_too_long_has_failed():
    path, body = BODIES["responses"]
    s = server()
    events = s.post(path, body | {"stream": True}).text.split("\n\n")
    response_id = json.loads(events[0].rpartition("data: ")[2])["response"]["id"]
    last = json.loads(events[-2].rpartition("data: ")[2])
    assert (last["type"], last["code"], last["sequence_number"]) == ("error", "ResponseTooLarge", len(events) - 2)
    stored = s.get(f"{path}/{response_id}").json()
    assert stored["status"] == "failed" and "max-response-bytes" in stored["error"]["message"]


def test_a_budget():
    budget = ResponseBudget(10)
    assert budget.spend(b"12345") == b"12345"
    assert budget.spend(b"67890") == b"67890"
    with pytest.raises(ResponseTooLarge, match="over 10 bytes"):
        budget.spend(b"1")
    with pytest.raises(ResponseTooLarge):
        ResponseBudget(10).whole(Response(b"12345678901"))
    assert ResponseBudget(10).whole(Response(b"1234567890")).body == b"1234567890"
    small = ResponseBudget(10)
    with pytest.raises(ResponseTooLarge):
        small.spend(b"1" * 11)
    with pytest.raises(ResponseTooLarge):  # as a smaller frame would leave a gap
        small.spend(b"1")
