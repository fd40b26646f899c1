"""`logprobs_mode`, by the flag and by the request, on every route, against transformers' warpers."""

import math
from typing import Any

import pytest
import torch
from doors import HttpDoor
from transformers import AutoModelForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper

from multilora.demo import base_model_path
from multilora.errors import BadRequest, ConfigError

PROMPT = [5, 9, 44, 301, 12]
SAMPLING = {"temperature": 0.7, "top_k": 40, "seed": 3}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["raw", "processed_logprobs"])
def door(request):
    door = HttpDoor(base_model_path(), served_model_name="base", logprobs_mode=request.param)
    yield door
    door.close()


def completion(door: HttpDoor, **fields: Any) -> tuple[list[int], list[float]]:
    body = {"prompt": PROMPT, "max_tokens": 8, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
    choice = door.post("/v1/completions", body | fields).json()["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def native(door: HttpDoor, *, seed: int = 0, **fields: Any) -> tuple[list[int], list[float]]:
    own = {name: fields.pop(name) for name in ("logprobs_mode",) if name in fields}
    params = {"max_new_tokens": 8, "ignore_eos": True, "sampling_seed": seed} | fields
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True} | own
    triples = door.post("/generate", body).json()["meta_info"]["output_token_logprobs"]
    return [token for _, token, _ in triples], [logprob for logprob, _, _ in triples]


@torch.inference_mode()
def reference(model: Any, answer: list[int], *, processed: bool) -> list[float]:
    ids = torch.tensor([[*PROMPT, *answer]])
    logits = model(ids).logits[0, len(PROMPT) - 1 : -1]
    if processed:
        logits = TemperatureLogitsWarper(SAMPLING["temperature"])(ids, logits)
        logits = TopKLogitsWarper(SAMPLING["top_k"])(ids, logits)
    return logits.log_softmax(-1).gather(1, ids[0, len(PROMPT) :, None])[:, 0].tolist()


@pytest.mark.parametrize("send", [completion, native])
def test_the_request_decides_and_the_flag_where_it_does_not(door, model, send):
    by_mode = {mode: send(door, **SAMPLING, **mode_of(mode)) for mode in (None, "raw", "processed", "raw_logprobs")}
    [answer] = {tuple(tokens) for tokens, _ in by_mode.values()}
    served = "processed" if door.front.config.logprobs_mode == "processed_logprobs" else "raw"
    assert by_mode[None] == by_mode[served]
    assert by_mode["raw_logprobs"] == by_mode["raw"]
    for mode, processed in (("raw", False), ("processed", True)):
        assert by_mode[mode][1] == pytest.approx(reference(model, list(answer), processed=processed), abs=2e-3)


def mode_of(mode: str | None) -> dict[str, str]:
    return {} if mode is None else {"logprobs_mode": mode}


def test_greedy_answers_have_the_logprobs_of_no_temperature(door, model):
    answer, logprobs = completion(door, temperature=0, top_p=0.1, logprobs_mode="processed_logprobs")
    assert logprobs == pytest.approx(reference(model, answer, processed=False), abs=2e-3)


def test_chats(door):
    body = {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 5, "top_k": 2, "seed": 1}
    found = {}
    for mode in ("raw", "processed"):
        choice = door.post("/v1/chat/completions", body | {"logprobs_mode": mode}).json()["choices"][0]
        found[mode] = choice["logprobs"]["content"]
    assert [one["token"] for one in found["raw"]] == [one["token"] for one in found["processed"]]
    for raw, processed in zip(found["raw"], found["processed"], strict=True):
        assert len(raw["top_logprobs"]) == 5 and len(processed["top_logprobs"]) == 2
        assert sum(math.exp(top["logprob"]) for top in processed["top_logprobs"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", ["raw_logits", "processed_logits", "Raw", "", 3, ["raw"], {}])
def test_bad_modes(door, value):
    for route, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/generate", {"text": "x"}),
    ):
        with pytest.raises(BadRequest, match=r"logprobs_mode = .* must be one of raw, processed"):
            door.post(route, body | {"logprobs_mode": value})


def test_a_bad_flag():
    with pytest.raises(ConfigError, match=r"--logprobs-mode must be one of raw, .*, is 'raw_logits'"):
        HttpDoor(base_model_path(), logprobs_mode="raw_logits")
