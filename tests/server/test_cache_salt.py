"""`cache_salt` and `extra_key`: which requests share a cached prefix, seen from outside; and `priority`."""

from typing import Any

import pytest
from doors import HttpDoor
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

from multilora.demo import base_model_path
from multilora.errors import BadRequest

MESSAGES = [{"role": "user", "content": "Tell me about the weather in Oslo, please."}]


@pytest.fixture(scope="module")
def door():
    door = HttpDoor(base_model_path(), served_model_name="base", page_size=4)
    yield door
    door.close()


def completions(door: HttpDoor, prompt: list[int], **fields: Any) -> tuple[int, str]:
    """(cached tokens, text)."""
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0} | fields
    answer = door.post("/v1/completions", body).json()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"][0]["text"]


def chat(door: HttpDoor, prompt: list[int], **fields: Any) -> tuple[int, str]:
    messages = [{"role": "system", "content": str(prompt)}, *MESSAGES]
    body = {"messages": messages, "max_tokens": 6, "temperature": 0} | fields
    answer = door.post("/v1/chat/completions", body).json()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"][0]["message"]["content"]


def generate(door: HttpDoor, prompt: list[int], **fields: Any) -> tuple[int, str]:
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 6, "temperature": 0}} | fields
    answer = door.post("/generate", body).json()
    return answer["meta_info"]["cached_tokens"], answer["text"]


@pytest.mark.parametrize("send", [completions, chat, generate])
def test_only_equal_salts_share(door, send):
    prompt = [100 + len(send.__name__) + i for i in range(17)]
    salts = [{}, {"cache_salt": "a"}, {"extra_key": "a"}, {"cache_salt": "a", "extra_key": "a"}, {"cache_salt": "b"}]
    alone = [send(door, prompt, **salt) for salt in salts]
    again = [send(door, prompt, **salt) for salt in salts]
    assert len({cached for cached, _ in alone}) == 1, "BOS and template at most, which other tests may have cached"
    assert all(cached >= 16 for cached, _ in again)
    assert len({text for _, text in alone + again}) == 1
    assert send(door, prompt, cache_salt="") == again[0]


def test_one_salt_for_each_prompt(door):
    prompts = [[700 + i for i in range(17)]] * 2
    params = {"max_new_tokens": 1, "temperature": 0}
    for expected in (0, 16):
        for salts in (["x", "y"], ["y", None]):
            answers = [
                door.post("/generate", {"input_ids": p, "sampling_params": params, "cache_salt": salt}).json()
                for p, salt in zip(prompts, salts, strict=True)
            ]
            cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
            assert cached == ([expected] * 2 if salts == ["x", "y"] else [16, expected])
    body = {"prompt": prompts, "max_tokens": 1, "cache_salt": ["x", None]}
    assert door.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
    batch = {"input_ids": prompts, "sampling_params": params, "extra_key": ["p", "q"]}
    assert [a["meta_info"]["cached_tokens"] for a in door.post("/generate", batch).json()] == [0, 0]
    assert [a["meta_info"]["cached_tokens"] for a in door.post("/generate", batch).json()] == [16, 16]


@pytest.mark.parametrize("send", [completions, chat, generate])
@pytest.mark.parametrize("value", [3, True, {"a": 1}, "x" * 1025, ["a", "b"], [4]])
@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
def test_bad_salts(door, send, field, value):
    with pytest.raises(BadRequest, match=field):
        send(door, [5, 6, 7], **{field: value})


@pytest.mark.parametrize("send", [completions, chat, generate])
def test_priority_changes_no_answer_and_must_be_a_number(door, send):
    assert {send(door, [5, 6, 7], priority=p)[1] for p in (None, 0, -5, 2**62, 7.0)} == {send(door, [5, 6, 7])[1]}
    for value in ("high", 1.5, True, 2**63, -(2**70)):
        with pytest.raises(BadRequest, match="priority"):
            send(door, [5, 6, 7], priority=value)


@pytest.mark.parametrize(("policy", "heeded"), [("fair", True), ("priority", True), ("fcfs", False), ("lpm", False)])
def test_a_priority_is_heeded_or_refused(policy, heeded):
    server = LocalServer(FakeEngineClient(), byte_level_tokenizer(), schedule_policy=policy)
    for route, fields in (("/generate", {"text": "hi"}), ("/v1/completions", {"model": "base", "prompt": "hi"})):
        answer = run(server.send("POST", route, fields | {"priority": 3}))
        assert answer.status == (200 if heeded else 400), answer.text
        assert heeded or ("priority = 3" in answer.text and "fair or priority" in answer.text)
        assert run(server.send("POST", route, fields | {"priority": 0})).status == 200
