"""/v1/messages and its count_tokens through HTTP: blocks in and out, the events of a stream, errors, keys.

Covers `anthropic/answer.py`, `anthropic/body.py`, `anthropic/errors.py`, `anthropic/messages.py`,
`anthropic/routes.py` too.
"""

import asyncio
import json
from typing import Any

import pytest
from doors import HttpDoor
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

from multilora.demo import base_model_path
from multilora.errors import CannotFit

TOKENIZER = byte_level_tokenizer()
EOS = 1
HELLO = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "of a city", "input_schema": CITY}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
PARSERS = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}


def fake(text: str = "ab", context_length: int = 4096, **config: Any) -> LocalServer:
    answer = [*TOKENIZER.encode(text)[1:], EOS]
    client = FakeEngineClient(
        vocab_size=320, context_length=context_length, eos_token_ids=(EOS,), answer=lambda submit: list(answer)
    )
    return LocalServer(client, TOKENIZER, **config)


def message(server: Any, **body: Any) -> Any:
    return server.post("/v1/messages", {"model": "base", "max_tokens": 200, "messages": HELLO} | body)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose names are checked."""
    *frames, rest = text.split("\n\n")
    assert rest == ""
    events = []
    for one in frames:
        name, data = one.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream, as Anthropic's own does."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    made: dict[str, Any] = events[0]["message"]
    assert made["content"] == [] and made["stop_reason"] is None
    for event in events[2:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(made["content"])
                made["content"].append(dict(event["content_block"]))
                inputs = ""
            case "content_block_delta":
                block, delta = made["content"][event["index"]], event["delta"]
                match delta["type"]:
                    case "input_json_delta":
                        inputs += delta["partial_json"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case kind:
                        block[kind.removesuffix("_delta")] += delta[kind.removesuffix("_delta")]
            case "content_block_stop":
                assert event["index"] == len(made["content"]) - 1
                if made["content"][-1]["type"] == "tool_use":
                    made["content"][-1]["input"] = json.loads(inputs)
            case "message_delta":
                made |= event["delta"] | {"usage": event["usage"]}
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    return made


def without_ids(made: dict[str, Any]) -> dict[str, Any]:
    blocks = [{k: v for k, v in block.items() if k not in ("id", "signature")} for block in made["content"]]
    return {k: v for k, v in made.items() if k != "id"} | {"content": blocks}


def prompt(server: LocalServer) -> str:
    """What the chat template made of the last request."""
    return TOKENIZER.decode(server.client.submitted[-1].input_ids, skip_special_tokens=False)


def test_the_whole_message():
    server = fake()
    body = message(server, system="be", temperature=0.5, top_p=0.9, top_k=3, metadata={"user_id": "u"}).json()
    assert body.pop("id").startswith("msg_")
    read = len(server.client.submitted[0].input_ids)
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "base",
        "content": [{"type": "text", "text": "ab"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": read - 1,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 1,
            "output_tokens": 3,
        },
        "weight_version": "default",
        "lora_version": None,
    }
    sampling = server.client.submitted[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (200, 0.5, 0.9, 3)
    assert prompt(server) == "<s><|im|>system: be</s><|im|>user: hi</s><|im|>assistant: "


def test_the_events_of_a_text():
    events = events_of(message(fake(), stream=True).text)
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"]["output_tokens"] == 0 and events[0]["message"]["id"].startswith("msg_")
    assert events[2]["content_block"] == {"type": "text", "text": ""}
    assert [event["delta"] for event in events[3:5]] == [{"type": "text_delta", "text": c} for c in "ab"]
    assert without_ids(joined(events)) == without_ids(message(fake()).json())


def test_thoughts_text_and_a_call_whole_and_streamed():
    server = fake("<think>\nhm\n</think>\n\nSo: " + HERMES, **PARSERS)
    whole = message(server, tools=[WEATHER]).json()
    thoughts, text, call = whole["content"]
    assert thoughts["thinking"] == "hm" and thoughts["signature"]
    assert text == {"type": "text", "text": "So:"}
    assert call["id"] and (call["name"], call["input"]) == ("weather", {"city": "Rome"})
    assert whole["stop_reason"] == "tool_use"
    assert without_ids(joined(events_of(message(server, tools=[WEATHER], stream=True).text))) == without_ids(whole)


def test_how_answers_end():
    stopped = message(fake("abcd"), stop_sequences=["c"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "c")
    assert stopped["content"][0]["text"] == "ab"
    assert message(fake(), max_tokens=1).json()["stop_reason"] == "max_tokens"
    assert message(fake("a" * 99, context_length=40)).json()["stop_reason"] == "model_context_window_exceeded"
    empty = message(fake("")).json()
    assert (empty["content"], empty["stop_reason"]) == ([], "end_turn")


def test_blocks_become_messages():
    server = fake()
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"} | cached, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "so"},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
                {"type": "tool_use", "id": "t2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "wet"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "be"} | cached, {"type": "text", "text": "nice"}]
    assert message(server, messages=messages, system=system, tools=[WEATHER]).status == 200
    assert prompt(server).split("<|im|>")[1:] == [
        "system: be\nnice</s>",
        "user: a\nb</s>",
        "assistant: so</s>",
        "tool: sunny</s>",
        "tool: wet</s>",
        "user: and?</s>",
        "assistant: ",
    ]


def test_the_template_sees_thoughts_calls_and_whether_to_think():
    tokenizer = byte_level_tokenizer()
    tokenizer.hf.chat_template = (
        "{{ enable_thinking }};{% for m in messages %}{{ m.reasoning_content }};{% for c in m.tool_calls or [] %}"
        "{{ c.id }}:{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    client = FakeEngineClient(vocab_size=320, context_length=4096, eos_token_ids=(EOS,), answer=lambda _: [5, EOS])
    server = LocalServer(client, tokenizer)
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
    ]
    result = [{"type": "tool_result", "tool_use_id": "t1"}]
    messages = [{"role": "assistant", "content": blocks}, {"role": "user", "content": result}]
    for kind, wanted in (("enabled", "True"), ("disabled", "False"), ("adaptive", "")):
        thinking = {"type": kind, "budget_tokens": 1024} if kind == "enabled" else {"type": kind}
        assert message(server, messages=messages, thinking=thinking).status == 200
        assert prompt(server).removeprefix("<s>") == f"{wanted};hm;t1:Rome;"


def test_an_answer_may_be_begun():
    server = fake()
    begun = [*HELLO, {"role": "assistant", "content": "so"}]
    assert message(server, messages=begun).status == 200
    assert prompt(server).endswith("<|im|>assistant: so")


@pytest.mark.parametrize(
    ("choice", "forced"),
    [({"type": "auto"}, False), ({"type": "none"}, False), ({"type": "any"}, True)]
    + [({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, True)],
)
def test_tool_choices(choice, forced):
    server = fake()
    assert message(server, tools=[WEATHER], tool_choice=choice).status == 200
    assert (server.client.submitted[0].grammar is not None) == forced


def test_forced_calls_of_a_model():
    door = HttpDoor(base_model_path(), served_model_name="base", context_length=512)
    try:
        body = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}, "temperature": 0}
        whole = message(door, **body).json()
        assert whole["stop_reason"] == "tool_use"
        [call] = whole["content"]
        assert call["name"] == "weather" and call["input"]["city"] in ("Rome", "Oslo")
        streamed = joined(events_of(message(door, **body, stream=True).text))
        assert [block["input"] for block in streamed["content"]] == [call["input"]]
    finally:
        door.close()


def test_answers_that_follow_a_schema():
    server = fake()
    config = {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}}
    assert message(server, output_config=config).status == 200
    assert server.client.submitted[0].grammar is not None


def test_tokens_are_counted_without_an_answer():
    server = fake()
    body = {"model": "base", "messages": HELLO, "system": "be", "tools": [WEATHER]}
    counted = server.post("/v1/messages/count_tokens", body)
    assert server.client.submitted == []
    message(server, **body)
    assert counted.json() == {"input_tokens": len(server.client.submitted[0].input_ids)}
    wrong = server.post("/v1/messages/count_tokens", body | {"model": "nope"})
    assert (wrong.status, wrong.json()["type"]) == (404, "error")


def test_which_adapter():
    server = fake()
    server.load("sql")
    for model in ("sql", "base:sql"):
        assert message(server, model=model).json()["model"] == model
        assert len(server.client.submitted[-1].adapters) == 1
    message(server)
    assert server.client.submitted[-1].adapters == ()


BAD = [
    ({"model": "nope"}, 404, "not_found_error", "nope"),
    ({"model": "base:nope"}, 400, "invalid_request_error", "never been loaded"),
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens = 0"),
    ({"messages": []}, 400, "invalid_request_error", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error", "messages[0].role"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "invalid_request_error", "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0].type",
    ),
    (
        {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]},
        400,
        "invalid_request_error",
        "messages[1].content[0].input",
    ),
    ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences = "),
    ({"stop_sequences": [f"s{i}" for i in range(99)]}, 400, "invalid_request_error", "stop_sequences: 99 stop"),
    ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "tools[0].type"),
    ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools[0].input_schema"),
    (
        {"tools": [WEATHER | {"input_schema": {"type": "array"}}]},
        400,
        "invalid_request_error",
        "tools[0].input_schema",
    ),
    ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "x"}}, 400, "invalid_request_error", "tool_choice.type"),
    ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error", "mcp_servers"),
    ({"container": "c"}, 400, "invalid_request_error", "container"),
    ({"response_format": {"type": "json_object"}}, 400, "invalid_request_error", "response_format"),
]


@pytest.mark.parametrize(("body", "status", "kind", "words"), BAD)
def test_bad_input(body, status, kind, words):
    server = fake()
    answer = message(server, **body)
    found = answer.json()
    assert (answer.status, found["type"], found["error"]["type"]) == (status, "error", kind), answer.text
    assert words in found["error"]["message"] and server.client.submitted == []


def test_errors_of_the_engine_and_aborts():
    server = fake()
    server.client.refuse = lambda submit: CannotFit("too big")
    for stream in (False, True):
        answer = message(server, stream=stream)
        assert (answer.status, answer.json()["error"]["message"]) == (400, "too big")

    server = fake("a" * 900)

    async def scenario() -> str:
        stream = server.connect("POST", "/v1/messages", {"max_tokens": 999, "messages": HELLO, "stream": True})
        await stream.next()
        server.client.gate.clear()
        server.driver.front.abort(None)
        return (await stream.answer()).text

    [*_, last] = events_of(run(scenario()))
    assert last["type"] == "error" and last["error"]["type"] == "api_error" and "aborted" in last["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_hangs_up_aborts_what_runs(stream):
    server = fake()

    async def scenario() -> None:
        server.client.gate.clear()
        connection = server.connect("POST", "/v1/messages", {"max_tokens": 9, "messages": HELLO, "stream": stream})
        while not server.client.submitted:
            await asyncio.sleep(0)
        connection.hang_up()
        await connection.answer()
        assert server.client.aborted == [server.client.submitted[0].rid]

    run(scenario())


def test_keys():
    server = fake(api_key="secret")
    body = {"max_tokens": 9, "messages": HELLO}
    assert server.post("/v1/messages", body, **{"x-api-key": "secret"}).status == 200
    assert server.post("/v1/messages", body, authorization="Bearer secret").status == 200
    for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": "secret", "authorization": "Bearer wrong"}):
        answer = server.post("/v1/messages", body, **headers)
        assert (answer.status, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert server.get("/v1/models").error["code"] == "invalid_api_key"
