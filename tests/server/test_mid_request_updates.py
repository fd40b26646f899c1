"""An adapter replaced while requests of it run (`allow_update_mid_request`): who goes on with it, and how the answers
of each route name the versions of their tokens."""

import asyncio
import base64
import json
from typing import Any

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import Answer, Connection, LocalServer, run
from fakes.tokenizers import byte_level_tokenizer
from safetensors.torch import save

from multilora.engine.messages import ReplaceAdapter

TOKENIZER = byte_level_tokenizer()
ANSWER = TOKENIZER.encode("hello you")[1:]
LOAD = "/load_lora_adapter"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
SWITCH = 3  # tokens before it


def body_of(step: int, **fields: Any) -> dict[str, Any]:
    return {"lora_name": "a", "lora_path": "/p", "upsert": True, "weight_version": f"step {step}"} | fields


UPDATE = body_of(2, allow_update_mid_request=True)
SPANS = [
    {"version": "step 1", "start": 0, "end": SWITCH, "lora_version": 1},
    {"version": "step 2", "start": SWITCH, "end": len(ANSWER), "lora_version": 2},
]
NEW = {"weight_version": "step 2", "lora_version": 2}


def server(**config: Any) -> LocalServer:
    client = FakeEngineClient(vocab_size=320, eos_token_ids=(1,), answer=lambda _: ANSWER)
    return LocalServer(client, TOKENIZER, **config)


async def begin(s: LocalServer, route: str, body: dict[str, Any], tokens: int = SWITCH) -> Connection:
    """A request that has so many tokens and waits."""
    s.client.gate.clear()
    call = s.connect("POST", route, body)
    while not s.client.submitted:
        await asyncio.sleep(0)
    for count in range(1, tokens + 1):
        s.client.gate.set()
        while s.client.delivered[s.client.submitted[0].rid] < count:
            await asyncio.sleep(0)
        s.client.gate.clear()
    return call


def ask(s: LocalServer, route: str, body: dict[str, Any], *loads: dict[str, Any]) -> Answer:
    """The answer to a request in the middle of which these loads are performed."""

    async def scenario() -> Answer:
        assert (await s.send("POST", LOAD, body_of(1))).status == 200
        call = await begin(s, route, body)
        for load in loads:
            assert (await s.send("POST", LOAD, load)).status == 200
        s.client.gate.set()
        return await call.answer()

    answer: Answer = run(scenario())
    assert answer.status == 200
    return answer


def test_native_answers_name_the_versions_of_their_tokens() -> None:
    body = {"text": "x", "lora_path": "a"}
    meta = ask(server(), "/generate", body, UPDATE).json()["meta_info"]
    assert meta["weight_versions"] == SPANS
    assert {key: meta[key] for key in NEW} == NEW
    metas = [frame["meta_info"] for frame in ask(server(), "/generate", body | {"stream": True}, UPDATE).frames]
    for count, meta in enumerate(metas, 1):
        old = count <= SWITCH
        assert meta["lora_version"] == (1 if old else 2)
        assert ("weight_versions" in meta) is not old
    assert metas[SWITCH]["weight_versions"] == [SPANS[0], SPANS[1] | {"end": SWITCH + 1}]
    assert metas[-1]["weight_versions"] == SPANS


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate"])
def test_the_other_routes_name_them_too(route: str, stream: bool) -> None:
    tokens = {"token_ids": [5, 6], "sampling_params": {}}
    body = {"/v1/completions": {"prompt": "x"}, "/v1/chat/completions": CHAT}.get(route, tokens)
    answer = ask(server(), route, body | {"model": "a", "stream": stream}, UPDATE)
    frames = answer.frames if stream else [answer.json()]
    last = [choice for frame in frames for choice in frame["choices"] if choice["finish_reason"]]
    assert [choice["weight_versions"] for choice in last] == [SPANS]
    if route != "/inference/v1/generate":
        assert [frame["metadata"] for frame in frames if "metadata" in frame] == [NEW]


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])
def test_translated_routes_name_them_beside_their_other_fields(route: str) -> None:
    wanted = {"input": "x"} if route == "/v1/responses" else CHAT | {"max_tokens": 50}
    body = wanted | {"model": "a"}
    whole = ask(server(), route, body, UPDATE).json()
    assert {key: whole[key] for key in NEW} == NEW
    assert whole["weight_versions"] == SPANS
    text = ask(server(), route, body | {"stream": True}, UPDATE).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    told = [event.get("response") or event.get("message") or event for event in events]
    first, *_, last = [one for one in told if "lora_version" in one]
    assert (first["lora_version"], "weight_versions" in first) == (1, False)
    assert (last["lora_version"], last["weight_versions"]) == (2, SPANS)


def test_what_has_not_asked_for_it_keeps_its_version() -> None:
    s = server()
    meta = ask(s, "/generate", {"text": "x", "lora_path": "a"}, body_of(2)).json()["meta_info"]
    assert meta["weight_versions"] == [SPANS[0] | {"end": len(ANSWER)}]
    assert not any(isinstance(call, ReplaceAdapter) for call in s.client.calls)


@pytest.mark.parametrize("explicit", [None, False])
def test_the_servers_load_mode_is_the_default(explicit: bool | None) -> None:
    body = body_of(2, allow_update_mid_request=explicit)
    del body["upsert"]
    answer = ask(server(lora_load_mode="update"), "/generate", {"text": "x", "lora_path": "a"}, body)
    assert len(answer.json()["meta_info"]["weight_versions"]) == (2 if explicit is None else 1)


def test_two_updates_on_the_way_and_the_old_versions_go() -> None:
    s = server()
    third = body_of(3, allow_update_mid_request=True)

    async def scenario() -> None:
        await s.send("POST", LOAD, body_of(1))
        call = await begin(s, "/generate", {"text": "x", "lora_path": "a"})
        await s.send("POST", LOAD, UPDATE)
        while s.client.unloaded != [1]:  # its only request has gone on with another
            await asyncio.sleep(0)
        replaced = s.client.submitted[0]
        s.client.submitted[0] = type(replaced)(
            rid=replaced.rid, input_ids=[], sampling=replaced.sampling, adapters=((2, 1.0),)
        )
        await s.send("POST", LOAD, third)
        s.client.gate.set()
        meta = (await call.answer()).json()["meta_info"]
        both = [SPANS[0], {"version": "step 3", "start": SWITCH, "end": len(ANSWER), "lora_version": 3}]
        assert meta["weight_versions"] == both, "none of the tokens is of version 2"
        while s.client.unloaded != [1, 2]:
            await asyncio.sleep(0)
        assert [ref.num_requests for ref in s.registry.refs()] == [0]

    run(scenario())


def test_an_update_before_the_first_token_is_the_whole_answers_version() -> None:
    s = server()

    async def scenario() -> None:
        await s.send("POST", LOAD, body_of(1))
        call = await begin(s, "/generate", {"text": "x", "lora_path": "a"}, tokens=0)
        await s.send("POST", LOAD, UPDATE)
        s.client.gate.set()
        meta = (await call.answer()).json()["meta_info"]
        assert meta["weight_versions"] == [SPANS[1] | {"start": 0}]

    run(scenario())


def test_tensors_update_running_requests_too() -> None:
    text = base64.b64encode(save({})).decode()
    body = UPDATE | {"config_dict": {"r": 8}, "serialized_tensors": text}
    del body["lora_path"]
    s = server()

    async def scenario() -> None:
        await s.send("POST", LOAD, body_of(1))
        call = await begin(s, "/generate", {"text": "x", "lora_path": "a"})
        answer = await s.send("POST", "/load_lora_adapter_from_tensors", body)
        assert answer.status == 200, answer.text
        s.client.gate.set()
        assert (await call.answer()).json()["meta_info"]["weight_versions"] == SPANS

    run(scenario())
