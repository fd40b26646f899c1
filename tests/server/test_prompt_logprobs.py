"""`prompt_logprobs` of a real engine, against transformers on the same tokens."""

import json
from typing import Any

import pytest
import torch
from doors import HttpDoor
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from transformers import AutoModelForCausalLM

from multilora.demo import base_model_path
from multilora.errors import BadRequest

PROMPT = [5, 9, 44, 301, 12, 12, 77, 230, 8, 91, 15, 600, 601, 33, 2, 71, 18, 19, 20, 21, 400, 401, 3, 90, 91]
MESSAGES = [{"role": "user", "content": "What is the capital of Norway?"}]


@pytest.fixture(scope="module")
def door():
    door = HttpDoor(base_model_path(), served_model_name="base", page_size=4, chunked_prefill_size=8)
    yield door
    door.close()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()


def complete(door: HttpDoor, **body: Any) -> Any:
    return door.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1, "temperature": 0} | body).json()


@torch.inference_mode()
def check(model: Any, ids: list[int], found: list[Any], best: int) -> None:
    """`found` is vLLM's shape for the prompt `ids`: own token first, then the best, each with its rank."""
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert len(found) == len(ids) and found[0] is None
    for i, position in enumerate(found[1:]):
        own, row = ids[i + 1], logprobs[i]
        order = row.sort(descending=True, stable=True).indices.tolist()
        assert list(position) == [str(t) for t in dict.fromkeys([own, *order[:best]])]
        for token, entry in position.items():
            assert entry["logprob"] == pytest.approx(row[int(token)].item(), abs=1e-3)
            assert entry["rank"] == order.index(int(token)) + 1
            assert isinstance(entry["decoded_token"], str)


@pytest.mark.parametrize("best", [0, 1, 5])
def test_on_the_choices_of_completions(door, model, best):
    choices = complete(door, prompt_logprobs=best, n=2)["choices"]
    for choice in choices:
        check(model, PROMPT, choice["prompt_logprobs"], best)
    assert choices[0]["logprobs"] is None


def test_at_the_top_of_a_chat(door, model):
    body = {"messages": MESSAGES, "max_tokens": 1, "prompt_logprobs": 2, "return_token_ids": True}
    answer = door.post("/v1/chat/completions", body).json()
    check(model, answer["prompt_token_ids"], answer["prompt_logprobs"], 2)
    assert "prompt_logprobs" not in answer["choices"][0]


def test_a_cached_prefix_does_not_shorten_them(door, model):
    prompt = PROMPT[::-1]
    assert complete(door, prompt=prompt)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    again = complete(door, prompt=prompt)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 24
    scored = complete(door, prompt=prompt, prompt_logprobs=0)
    assert scored["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    check(model, prompt, scored["choices"][0]["prompt_logprobs"], 0)
    assert scored["choices"][0]["text"] == again["choices"][0]["text"]


def test_beside_echo_and_logprobs_each_has_its_own_number_of_alternatives(door, model):
    [choice] = complete(door, prompt_logprobs=1, echo=True, logprobs=3)["choices"]
    check(model, PROMPT, choice["prompt_logprobs"], 1)
    assert all(2 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"][1:])  # of tokens with equal texts one
    [choice] = complete(door, prompt_logprobs=4, echo=True, logprobs=1)["choices"]
    check(model, PROMPT, choice["prompt_logprobs"], 4)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * len(PROMPT)


def test_a_prompt_of_one_token_and_no_new_tokens(door):
    [choice] = complete(door, prompt=[5], max_tokens=0, prompt_logprobs=3)["choices"]
    assert choice["prompt_logprobs"] == [None]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_has_them_in_its_first_chunk(door, route):
    body = {"prompt": PROMPT} if route == "/v1/completions" else {"messages": MESSAGES}
    body |= {"max_tokens": 4, "temperature": 0, "prompt_logprobs": 1}
    first, *others = door.post(route, body | {"stream": True}).frames
    whole = door.post(route, body).json()

    def holder(answer: Any) -> Any:
        return answer["choices"][0] if route == "/v1/completions" else answer

    assert holder(first)["prompt_logprobs"] == holder(whole)["prompt_logprobs"]
    assert not any("prompt_logprobs" in holder(other) for other in others if other["choices"])


@pytest.mark.parametrize("value", [-1, 21, 1.5, "1", True, [1]])
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_bad_values(door, route, value):
    body = {"prompt": "x"} if route == "/v1/completions" else {"messages": MESSAGES}
    with pytest.raises(BadRequest, match="prompt_logprobs"):
        door.post(route, body | {"prompt_logprobs": value})


def test_without_a_tokenizer_and_not_finite():
    server = LocalServer(FakeEngineClient(), None)
    answer = server.post("/v1/completions", {"prompt": [5, 6], "prompt_logprobs": 2})
    [choice] = answer.json()["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "6": {"logprob": -1.25, "rank": 8, "decoded_token": None},
            "3": {"logprob": -0.5, "rank": 1, "decoded_token": None},
            "4": {"logprob": -1.5, "rank": 2, "decoded_token": None},
        },
    ]
    assert list(json.loads(answer.body)["choices"][0]["prompt_logprobs"][1]) == ["6", "3", "4"]
