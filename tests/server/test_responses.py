"""/v1/responses through HTTP: items in and out, the events of a stream, stored responses, endings.

Covers `responses/body.py`, `responses/event_log.py`, `responses/item_pages.py`, `responses/items.py`,
`responses/output.py`, `responses/routes.py`, `responses/run.py` too.
"""

import asyncio
import json
from typing import Any

import httpx
import pytest
from doors import HttpDoor
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer
from openai import AsyncOpenAI

from multilora.demo import base_model_path
from multilora.errors import CannotFit, EngineDead

TOKENIZER = byte_level_tokenizer()
EOS = 1
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ALL_KINDS = "<think>\nhm\n</think>\n\nSo: " + HERMES
PARSERS = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}


def fake(text: str = "ab", **config: Any) -> LocalServer:
    answer = [*TOKENIZER.encode(text)[1:], EOS]
    client = FakeEngineClient(
        vocab_size=320, context_length=4096, eos_token_ids=(EOS,), answer=lambda submit: list(answer)
    )
    return LocalServer(client, TOKENIZER, **config)


def respond(server: LocalServer, **body: Any) -> Any:
    return server.post("/v1/responses", {"model": "base", "input": "hi"} | body)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose names and numbers are checked."""
    *frames, rest = text.split("\n\n")
    assert rest == ""
    events = []
    for number, one in enumerate(frames):
        name, data = one.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


def prompt(server: LocalServer, which: int = -1) -> str:
    """What the chat template made of the request."""
    return TOKENIZER.decode(server.client.submitted[which].input_ids, skip_special_tokens=False)


def test_the_whole_object():
    server = fake()
    answer = respond(server, instructions="be", metadata={"k": "v"}, max_output_tokens=9, temperature=0.5, top_p=0.9)
    body = answer.json()
    assert body["id"].startswith("resp_") and body["object"] == "response" and body["status"] == "completed"
    [item] = body["output"]
    assert item["id"].startswith("msg_")
    content = [{"type": "output_text", "text": "ab", "annotations": [], "logprobs": []}]
    assert without_ids([item]) == [
        {"type": "message", "status": "completed", "role": "assistant", "content": content}
    ]
    told = {"instructions": "be", "metadata": {"k": "v"}, "max_output_tokens": 9, "temperature": 0.5, "top_p": 0.9}
    assert {key: body[key] for key in told} == told
    assert body["error"] is None and body["incomplete_details"] is None
    read = len(server.client.submitted[0].input_ids)
    assert body["usage"] == {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + 3,
    }
    sampling = server.client.submitted[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (9, 0.5, 0.9)
    assert prompt(server) == "<s><|im|>system: be</s><|im|>user: hi</s><|im|>assistant: "


MESSAGE_EVENTS = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def test_the_events_of_a_text():
    events = events_of(respond(fake(), stream=True).text)
    begin = ["response.created", "response.in_progress"]
    assert [event["type"] for event in events] == [*begin, *MESSAGE_EVENTS, "response.completed"]
    created, item = events[0]["response"], events[2]["item"]
    assert created["status"] == "in_progress" and created["output"] == [] and created["usage"] is None
    assert item["status"] == "in_progress" and item["content"] == []
    for event in events[3:8]:
        assert (event["item_id"], event["output_index"], event["content_index"]) == (item["id"], 0, 0)
    assert [event["delta"] for event in events[4:6]] == ["a", "b"]
    assert events[6]["text"] == events[7]["part"]["text"] == "ab"
    last = events[-1]["response"]
    assert last["output"] == [events[8]["item"]] and last["status"] == "completed"
    assert last["usage"]["output_tokens"] == 3 and last["id"] == created["id"]


def test_thoughts_text_and_a_call_whole_and_streamed():
    server = fake(ALL_KINDS, **PARSERS)
    whole = respond(server, tools=[WEATHER]).json()
    thoughts, message, call = whole["output"]
    assert thoughts["type"] == "reasoning" and thoughts["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"] == "So:"
    assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
    assert json.loads(call["arguments"]) == {"city": "Rome"}
    assert 0 < whole["usage"]["output_tokens_details"]["reasoning_tokens"] < whole["usage"]["output_tokens"]

    events = events_of(respond(server, tools=[WEATHER], stream=True).text)
    assert without_ids(events[-1]["response"]["output"]) == without_ids(whole["output"])
    assert events[-1]["response"]["usage"] == whole["usage"]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[2:9] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert kinds[-5:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2]
    assert events[-4]["delta"] == events[-3]["arguments"] == call["arguments"]
    assert events[-5]["item"]["arguments"] == "" and events[-3]["item_id"] == events[-5]["item"]["id"]


@pytest.mark.parametrize("cut", [None, 40], ids=["broken", "cut"])
def test_what_is_no_call_in_the_end_is_text_whole_and_streamed(cut):
    broken = '<tool_call>\n{"name": "weather", "arguments": {"city": oops}}\n</tool_call>'
    server = fake(broken, tool_call_parser="hermes")
    whole = respond(server, tools=[WEATHER], max_output_tokens=cut).json()
    [item] = whole["output"]
    assert item["type"] == "message" and broken.startswith(item["content"][0]["text"])
    assert whole["status"] == ("incomplete" if cut else "completed")
    events = events_of(respond(server, tools=[WEATHER], max_output_tokens=cut, stream=True).text)
    assert without_ids(events[-1]["response"]["output"]) == without_ids(whole["output"])


def test_a_cut_answer_is_incomplete():
    events = events_of(respond(fake(), max_output_tokens=1, stream=True).text)
    assert events[-1]["type"] == "response.incomplete"
    last = events[-1]["response"]
    assert last["status"] == last["output"][0]["status"] == "incomplete"
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}


def test_an_answer_without_text_is_an_empty_message():
    [item] = respond(fake("")).json()["output"]
    assert item["content"][0]["text"] == ""


def test_logprobs_belong_to_the_text():
    server = fake(ALL_KINDS, **PARSERS)
    include = ["message.output_text.logprobs"]
    whole = respond(server, tools=[WEATHER], include=include, top_logprobs=2).json()
    logprobs = whole["output"][1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in logprobs).strip() == "So:"
    assert all(len(entry["top_logprobs"]) == 2 and entry["bytes"] for entry in logprobs)
    events = events_of(respond(server, tools=[WEATHER], include=include, top_logprobs=2, stream=True).text)
    streamed = [
        entry for event in events if event["type"].endswith("text.delta") for entry in event.get("logprobs", [])
    ]
    assert streamed == logprobs
    assert respond(fake()).json()["output"][0]["content"][0]["logprobs"] == []


def test_input_items_become_messages():
    server = fake()
    items = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "so", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "wet"}]},
    ]
    assert respond(server, input=items, tools=[WEATHER]).status == 200
    turns = prompt(server).split("<|im|>")
    assert turns[1:] == [
        "system: be</s>",
        "user: a\nb</s>",
        "assistant: so</s>",
        "tool: sunny</s>",
        "tool: wet</s>",
        "assistant: ",
    ]


def test_a_response_goes_on_from_a_stored_one():
    server = fake(HERMES, **PARSERS)
    first = respond(server, instructions="be", tools=[WEATHER]).json()
    call = first["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    second = respond(server, previous_response_id=first["id"], input=[result]).json()
    assert second["previous_response_id"] == first["id"]
    assert prompt(server).split("<|im|>")[1:] == ["user: hi</s>", "assistant: </s>", "tool: sunny</s>", "assistant: "]
    third = respond(server, previous_response_id=second["id"], input="and?").json()
    assert third["status"] == "completed" and prompt(server).count("tool: sunny") == 1


def test_items_of_stored_responses_can_be_referred_to():
    server = fake()
    first = respond(server).json()
    items = [{"role": "user", "content": "hi"}, {"type": "item_reference", "id": first["output"][0]["id"]}]
    assert respond(server, input=[*items, {"role": "user", "content": "and?"}]).status == 200
    assert prompt(server).split("<|im|>")[1:] == [
        "user: hi</s>",
        "assistant: ab</s>",
        "user: and?</s>",
        "assistant: ",
    ]
    run(server.send("DELETE", f"/v1/responses/{first['id']}"))
    assert respond(server, input=items).error["param"] == "input[1].id"


def test_stored_responses_are_read_and_deleted():
    server = fake()
    kept = respond(server).json()
    path = f"/v1/responses/{kept['id']}"
    assert server.get(path).json() == kept
    assert server.post(f"{path}/cancel").json() == kept
    deleted = run(server.send("DELETE", path))
    assert deleted.json() == {"id": kept["id"], "object": "response", "deleted": True}
    gone = [server.get(path), server.post(f"{path}/cancel"), run(server.send("DELETE", path))]
    assert [answer.status for answer in gone] == [404] * 3
    assert kept["id"] in gone[0].error["message"] and gone[0].error["type"] == "not_found_error"
    follow = respond(server, previous_response_id=kept["id"])
    assert (follow.status, follow.error["code"]) == (400, "previous_response_not_found")


def test_store_false_keeps_nothing():
    server = fake()
    body = respond(server, store=False).json()
    assert body["store"] is False
    assert server.get(f"/v1/responses/{body['id']}").status == 404


def test_background_runs_on_without_its_client():
    server = fake()

    async def scenario() -> None:
        server.client.gate.clear()
        started = (await server.send("POST", "/v1/responses", {"input": "hi", "background": True})).json()
        assert started["status"] == "in_progress" and started["background"] is True
        path = f"/v1/responses/{started['id']}"
        follow = await server.send("POST", "/v1/responses", {"input": "x", "previous_response_id": started["id"]})
        assert (follow.status, follow.error["param"]) == (400, "previous_response_id")
        server.client.gate.set()
        while (found := (await server.send("GET", path)).json())["status"] == "in_progress":
            await asyncio.sleep(0)
        assert found["status"] == "completed" and found["output"][0]["content"][0]["text"] == "ab"

    run(scenario())


BACKGROUND = {"input": "hi", "background": True, "stream": True}


def test_a_background_stream_runs_on_without_its_client_and_is_resumed() -> None:
    server = fake("abcdef")

    async def scenario() -> None:
        server.client.gate.clear()
        first = server.connect("POST", "/v1/responses", BACKGROUND)
        assert (await first.next())["type"] == "http.response.start"
        created = json.loads((await first.next())["body"].split(b"data: ")[1])
        path = f"/v1/responses/{created['response']['id']}"
        assert created["response"]["background"] is True
        first.hang_up()
        await first.answer()
        early = server.connect("GET", f"{path}?stream=true")
        server.client.gate.set()
        events = events_of((await early.answer()).text)
        assert events[0] == created and events[-1]["type"] == "response.completed"
        assert events[-1]["response"] == (await server.send("GET", path)).json()
        for last in (0, 3, len(events) - 2):
            rest = await server.send("GET", f"{path}?stream=true&starting_after={last}")
            assert rest.headers["content-type"].startswith("text/event-stream")
            numbers = [json.loads(one.split("data: ")[1])["sequence_number"] for one in rest.text.split("\n\n")[:-1]]
            assert numbers == list(range(last + 1, len(events)))
        nothing = await server.send("GET", f"{path}?stream=true&starting_after={len(events) - 1}")
        assert (nothing.status, nothing.text) == (200, "")
        for query, param in (
            (f"stream=true&starting_after={len(events)}", "starting_after"),
            ("stream=true&starting_after=-2", "starting_after"),
            ("starting_after=1", "starting_after"),
        ):
            refused = await server.send("GET", f"{path}?{query}")
            assert (refused.status, refused.error["param"]) == (400, param)

    run(scenario())


def test_a_background_stream_that_is_cancelled_ends_for_all_its_readers() -> None:
    server = fake("abcdef")

    async def scenario() -> None:
        server.client.gate.clear()
        first = server.connect("POST", "/v1/responses", BACKGROUND)
        await first.next()
        created = json.loads((await first.next())["body"].split(b"data: ")[1])
        path = f"/v1/responses/{created['response']['id']}"
        second = server.connect("GET", f"{path}?stream=true&starting_after=0")
        await second.next()
        assert (await server.send("POST", f"{path}/cancel")).json()["status"] == "cancelled"
        for reader in (first, second):
            assert '"status":"cancelled"' in (await reader.answer()).text
        assert server.client.aborted

    run(scenario())


def test_only_a_background_stream_can_be_streamed_again() -> None:
    server = fake()
    for body in ({}, {"background": True}):
        path = f"/v1/responses/{respond(server, **body).json()['id']}"
        refused = server.get(f"{path}?stream=true")
        assert (refused.status, refused.error["param"]) == (400, "stream")


def test_input_items_are_listed_page_by_page() -> None:
    server = fake()
    first = respond(server, input="one").json()
    items = [{"role": "user", "content": "two", "id": "mine"}, {"role": "assistant", "content": "so"}]
    second = respond(
        server, previous_response_id=first["id"], input=[*items, {"role": "user", "content": "go"}]
    ).json()
    path = f"/v1/responses/{second['id']}/input_items"
    whole = server.get(f"{path}?order=asc").json()
    assert [item["content"][0]["text"] for item in whole["data"]] == ["one", "ab", "two", "so", "go"]
    assert [item["content"][0]["type"] for item in whole["data"]] == [
        "input_text",
        "output_text",
        "input_text",
        "output_text",
        "input_text",
    ]
    assert whole["data"][1] == first["output"][0] and whole["data"][2]["id"] == "mine"
    ids = [item["id"] for item in whole["data"]]
    assert (whole["first_id"], whole["last_id"], whole["has_more"]) == (ids[0], ids[-1], False)
    found, after = [], ""
    while True:
        part = server.get(f"{path}?limit=2{after}").json()
        found += [item["id"] for item in part["data"]]
        after = f"&after={part['last_id']}"
        if not part["has_more"]:
            break
    assert found == ids[::-1], "the last one first, by default"
    assert server.get(f"{path}?after={ids[0]}").json() | {"data": []} == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("after=x", "after")):
        refused = server.get(f"{path}?{query}")
        assert (refused.status, refused.error["param"]) == (400, param)
    assert server.get("/v1/responses/nope/input_items").status == 404


def test_openais_client_resumes_a_background_stream_and_lists_input_items() -> None:
    server = fake("abcdef")

    async def scenario() -> None:
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = AsyncOpenAI(api_key="-", base_url="http://test/v1", http_client=http)
            begun = [
                event
                async for event in await client.responses.create(
                    model="base", input="hi", background=True, stream=True, extra_body={"seed": 1}
                )
            ]
            response_id = begun[0].response.id
            resumed = [
                event async for event in await client.responses.retrieve(response_id, stream=True, starting_after=4)
            ]
            assert resumed == begun[5:] and resumed[-1].response.output_text == "abcdef"
            after = await client.responses.create(
                model="base", input=[{"role": "user", "content": "and?"}], previous_response_id=response_id
            )
            listed = [item async for item in client.responses.input_items.list(after.id, limit=1, order="asc")]
            assert [item.content[0].text for item in listed] == ["hi", "abcdef", "and?"]
            assert [item.role for item in listed] == ["user", "assistant", "user"]

    run(scenario())


@pytest.mark.parametrize("way", ["cancel", "delete"])
def test_ending_a_background_response_aborts_it(way):
    server = fake()

    async def scenario() -> None:
        server.client.gate.clear()
        started = (await server.send("POST", "/v1/responses", {"input": "hi", "background": True})).json()
        path = f"/v1/responses/{started['id']}"
        if way == "cancel":
            cancelled = (await server.send("POST", f"{path}/cancel")).json()
            assert cancelled["status"] == "cancelled"
            assert (await server.send("GET", path)).json() == cancelled
        else:
            await server.send("DELETE", path)
            assert (await server.send("GET", path)).status == 404
        assert server.client.aborted == [server.client.submitted[0].rid]

    run(scenario())


def test_cancelling_a_stream_ends_it():
    server = fake()

    async def scenario() -> None:
        server.client.gate.clear()
        stream = server.connect("POST", "/v1/responses", {"input": "hi", "stream": True})
        await stream.next()  # the head
        created = json.loads((await stream.next())["body"].partition(b"data: ")[2])
        answer = await server.send("POST", f"/v1/responses/{created['response']['id']}/cancel")
        assert answer.json()["status"] == "cancelled"
        rest = (await stream.answer()).text
        last = json.loads(rest.strip().rpartition("data: ")[2])
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        assert len(server.client.aborted) == 1

    run(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_hangs_up_aborts_what_runs(stream):
    server = fake()

    async def scenario() -> None:
        server.client.gate.clear()
        connection = server.connect("POST", "/v1/responses", {"input": "hi", "stream": stream})
        while not server.client.submitted:
            await asyncio.sleep(0)
        connection.hang_up()
        await connection.answer()
        assert server.client.aborted == [server.client.submitted[0].rid]

    run(scenario())


def test_an_error_of_the_engine():
    server = fake()
    server.client.refuse = lambda submit: CannotFit("too big")
    answer = respond(server)
    assert (answer.status, answer.error["message"]) == (400, "too big")
    events = events_of(respond(server, stream=True).text)
    assert events[-1]["type"] == "response.failed"
    failed = events[-1]["response"]
    assert failed["status"] == "failed" and failed["error"] == {"code": "server_error", "message": "too big"}
    assert server.get(f"/v1/responses/{failed['id']}").json() == failed


def test_an_engine_that_dies_in_the_middle_of_a_stream():
    server = fake("abc")

    async def scenario() -> str:
        server.client.gate.clear()
        stream = server.connect("POST", "/v1/responses", {"input": "hi", "stream": True})
        while not server.client.submitted:
            await asyncio.sleep(0)
        server.client.die()
        return (await stream.answer()).text

    events = events_of(run(scenario()))
    assert events[-1]["type"] == "response.failed" and "engine" in events[-1]["response"]["error"]["message"]
    assert respond(server).status == EngineDead.status


def test_which_adapter():
    server = fake()
    server.load("sql")
    for model in ("sql", "base:sql"):
        assert respond(server, model=model).json()["model"] == model
        assert len(server.client.submitted[-1].adapters) == 1
    respond(server)
    assert server.client.submitted[-1].adapters == ()
    assert respond(server, model="nope").status == 404
    assert respond(server, model="base:nope").status == 400


def test_answers_that_follow_a_schema():
    server = fake()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    given = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    answer = respond(server, text=given).json()
    assert answer["text"]["format"]["schema"] == schema
    assert server.client.tokenizer_info is not None
    assert respond(server, text={"format": {"type": "json_object"}}).status == 200
    assert respond(server, text={"format": {"type": "text"}, "verbosity": "medium"}).status == 200
    missing = respond(server, text={"format": {"type": "json_schema", "name": "n"}})
    assert (missing.status, missing.error["param"]) == (400, "text.format.schema")


NEUTRAL = [
    {"user": "u", "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "max_tool_calls": 3},
    {"truncation": "disabled", "conversation": None, "prompt": None, "reasoning": {"summary": "auto"}},
    {"stream_options": {"include_obfuscation": False}, "include": ["reasoning.encrypted_content"]},
    {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "top_logprobs": 0, "background": False},
]


@pytest.mark.parametrize("body", NEUTRAL)
def test_fields_that_ask_for_nothing(body):
    assert respond(fake(), **body).status == 200


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "x"}, fields]}


BAD = [
    ({"input": []}, "input"),
    ({"input": 1}, "input"),
    (item(type="item_reference", id="x"), "input[1].id"),
    (item(type="web_search_call", id="x"), "input[1].type"),
    (item(role="tool", content="x"), "input[1].role"),
    (item(role="user", content=[{"type": "input_image", "image_url": "x"}]), "input[1].content[0].type"),
    (item(role="user", content=[{"type": "input_text"}]), "input[1].content[0].text"),
    (item(type="function_call", call_id="c", name="f", arguments="{"), "input[1].arguments"),
    (item(type="function_call_output", call_id="c", output="x"), "input[1].call_id"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"max_output_tokens": -1}, "max_output_tokens"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"include": ["nope"]}, "include"),
    ({"truncation": "auto"}, "truncation"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"text": {"verbosity": "high"}}, "text"),
    ({"background": True, "store": False}, "background"),
    ({"max_tokens": 3}, "max_tokens"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_input(body, param):
    server = fake()
    answer = respond(server, **body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.text
    assert server.client.submitted == []


@pytest.fixture(scope="module")
def demo():
    door = HttpDoor(base_model_path(), served_model_name="base", context_length=512)
    yield door
    door.close()


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["text", "forced call"])
def test_openais_own_client(demo, tools):
    """What the client makes of a stream is what it gets in one piece."""

    async def both() -> list[Any]:
        transport = httpx.ASGITransport(demo.server.app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = AsyncOpenAI(api_key="-", base_url="http://test/v1", http_client=http)
            body: dict[str, Any] = {"model": "base", "input": "hi", "temperature": 0, "max_output_tokens": 60}
            if tools:
                body |= {"tools": tools, "tool_choice": {"type": "function", "name": "weather"}}
            whole = await client.responses.create(**body)
            async with client.responses.stream(**body) as stream:
                streamed = await stream.get_final_response()
            again = await client.responses.retrieve(whole.id)
            assert again.output == whole.output
            await client.responses.delete(whole.id)
            return [whole, streamed]

    whole, streamed = demo.run(both())
    assert whole.usage == streamed.usage and whole.status == streamed.status
    if tools:
        calls = [[(c.name, json.loads(c.arguments)) for c in one.output] for one in (whole, streamed)]
        assert calls[0] == calls[1] and calls[0][0][0] == "weather" and calls[0][0][1]["city"] in ("Rome", "Oslo")
    else:
        assert whole.output_text == streamed.output_text != ""
