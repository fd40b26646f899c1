"""`POST /inference/v1/generate`: the shape that rollout clients parse, from a real engine and from a fake one."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doors import HttpDoor
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer

ROUTE = "/inference/v1/generate"
PROMPT = [5, 17, 80, 33, 9]
GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpDoor]:
    from fakes.models import make_adapter, make_tiny_model
    from fakes.tokenizers import byte_level_tokenizer

    path: Path = tmp_path_factory.mktemp("files")
    tokenizer = byte_level_tokenizer()
    make_tiny_model(path / "model", vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=1)
    tokenizer.hf.save_pretrained(path / "model")
    make_adapter(path / "a", path / "model", r=8, lora_alpha=16, target_modules="all-linear")
    door = HttpDoor(path / "model", lora_paths={"a": str(path / "a")}, device="cpu", max_total_tokens=4096)
    yield door
    door.close()


def ask(http: HttpDoor, sampling: dict[str, Any] | None = None, **body: Any) -> Any:
    wanted = {"token_ids": PROMPT, "sampling_params": GREEDY | (sampling or {})} | body
    answer = http.run(http.server.send("POST", ROUTE, wanted))
    assert answer.status == 200, answer.text
    return answer.frames if body.get("stream") else answer.json()


def test_the_whole_answer(http: HttpDoor) -> None:
    found = ask(http, model="a", request_id="mine")
    [expected] = http.generate(PROMPT, {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}, "a")
    usage = found.pop("usage")
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 6)
    assert isinstance(found.pop("created"), int)
    assert found == {
        "request_id": "mine",
        "model": "a",
        "output_mode": "tokens",
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "metrics": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "mm_placeholders": None,
        "metadata": {"lora_version": 1, "weight_version": "default"},
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": expected.token_ids,
                "logprobs": None,
                "routed_experts": None,
                "sampling_mask": None,
                "weight_versions": [{"version": "default", "start": 0, "end": 6, "lora_version": 1}],
            }
        ],
    }
    assert ask(http)["choices"][0]["token_ids"] != expected.token_ids


@pytest.mark.parametrize("wanted", [0, 1, 3, True])
def test_logprobs_as_renderers_and_as_vllm_read_them(http: HttpDoor, wanted: int) -> None:
    [choice] = ask(http, {"logprobs": wanted, "temperature": 1.0, "seed": 3})["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert [entry["token_id"] for entry in content] == choice["token_ids"]
    assert all(math.isfinite(entry["logprob"]) and entry["logprob"] != -9999.0 for entry in content)
    for entry in content:
        own, *others = entry["top_logprobs"]
        assert own == {key: entry[key] for key in ("token", "token_id", "logprob", "rank")}
        assert int(wanted) - 1 <= len(others) <= int(wanted)
        assert sorted(others, key=lambda one: -one["logprob"]) == others
        assert own["token_id"] not in {one["token_id"] for one in others}


def test_prompt_logprobs_have_the_prompts_own_token_first(http: HttpDoor) -> None:
    found = ask(http, {"prompt_logprobs": 2, "logprobs": 0})
    first, *others = found["prompt_logprobs"]
    assert first is None
    assert [next(iter(position)) for position in others] == [str(token) for token in PROMPT[1:]]
    assert all(math.isfinite(next(iter(position.values()))["logprob"]) for position in others)
    assert all(len(entry["top_logprobs"]) == 1 for entry in found["choices"][0]["logprobs"]["content"])


def test_the_likeliest_token_has_rank_1(http: HttpDoor) -> None:
    [choice] = ask(http, {"logprobs": 0})["choices"]
    assert {entry["rank"] for entry in choice["logprobs"]["content"]} == {1}


def test_salts_keep_prefixes_apart(http: HttpDoor) -> None:
    def cached(**body: Any) -> int:
        usage = ask(http, token_ids=[7] * 40, priority=1, **body)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached(cache_salt="one"), cached(cache_salt="one"), cached(cache_salt="two")] == [0, 32, 0]


def test_a_stream_adds_up_to_the_whole(http: HttpDoor) -> None:
    sampling = {"n": 2, "seed": 5, "temperature": 1.0, "logprobs": 1}
    whole = ask(http, sampling)
    frames = ask(http, sampling, stream=True, request_id="mine", stream_options={"include_usage": True})
    assert {frame["request_id"] for frame in frames} == {"mine"}
    assert frames[-1]["choices"] == [] and frames[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [part for frame in frames for part in frame["choices"] if part["index"] == choice["index"]]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert [one for part in parts for one in part["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_stop_reasons(http: HttpDoor) -> None:
    [free] = ask(http)["choices"]
    stop = free["token_ids"][2]
    first = free["token_ids"].index(stop)
    [choice] = ask(http, {"stop_token_ids": [stop]})["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["token_ids"] == free["token_ids"][: first + 1]
    [choice] = ask(http, {"logit_bias": {"1": 100}, "ignore_eos": False})["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["token_ids"]) == ("stop", None, [1])


def test_the_prompt_comes_back_when_asked_for(http: HttpDoor) -> None:
    assert ask(http, return_token_ids=True)["prompt_token_ids"] == PROMPT
    first, *others = ask(http, return_token_ids=True, stream=True)
    assert first["prompt_token_ids"] == PROMPT
    assert not any("prompt_token_ids" in frame for frame in others)


# ---------------------------------------------------------------------- what the engine is asked for


@pytest.fixture
def server() -> LocalServer:
    return LocalServer(FakeEngineClient(), None)


def submitted(server: LocalServer, **body: Any) -> Any:
    answer = server.post(ROUTE, {"token_ids": PROMPT} | body)
    assert answer.status == 200, answer.text
    return server.client.submitted[-1]


def test_without_max_tokens_the_answer_may_fill_the_context(server: LocalServer) -> None:
    for sampling in (None, {}, {"max_tokens": None}):
        assert submitted(server, sampling_params=sampling).sampling.max_new_tokens == 256 - len(PROMPT)
    assert submitted(server, sampling_params={"max_tokens": 16}).sampling.max_new_tokens == 16


def test_vllms_names(server: LocalServer) -> None:
    given = {"min_tokens": 2, "seed": 7, "top_k": 0, "min_p": 0.1, "skip_special_tokens": False, "max_tokens": 9}
    extra = {"output_kind": 2, "detokenize": False, "logprobs": 1, "stop_token_ids": [3]}
    message = submitted(server, sampling_params=given | extra)
    params = message.sampling
    assert (params.min_new_tokens, params.sampling_seed, params.top_k, params.min_p) == (2, 7, -1, 0.1)
    assert params.stop_token_ids == [3]
    assert (message.return_logprob, message.top_logprobs_num) == (True, 1)


def test_a_logprob_that_is_not_finite_is_a_finite_number(server: LocalServer) -> None:
    from multilora.server.token_generate import LOWEST, _candidate

    assert _candidate(7, None, None) == {"token": "token_id:7", "token_id": 7, "logprob": LOWEST, "rank": None}
    assert _candidate(7, -math.inf, 2)["logprob"] == LOWEST


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": "text"}, "token_ids"),
        ({"token_ids": None}, "token_ids"),
        ({"sampling_params": {"stream": True}}, "stream"),
        ({"sampling_params": {"model": "a"}}, "model"),
        ({"sampling_params": {"temprature": 1}}, "temprature"),
        ({"sampling_params": {"logprobs": 99}}, "logprobs"),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"output_mode": "text"}, "output_mode"),
        ({"features": {"a": 1}}, "features"),
    ],
)
def test_what_is_refused_is_named(server: LocalServer, body: dict[str, Any], named: str) -> None:
    answer = server.post(ROUTE, {"token_ids": PROMPT} | body)
    assert answer.status == 400
    assert named in f"{answer.error['param']} {answer.error['message']}"
    assert server.client.submitted == []


def test_unknown_models_are_404(server: LocalServer) -> None:
    assert server.post(ROUTE, {"token_ids": PROMPT, "model": "nope"}).status == 404
