"""Tools and thoughts on POST /v1/chat/completions: forced calls of the bundled model, parsed calls of a fake one."""

import copy
import json
from typing import Any

import httpx
import pytest
from doors import HttpDoor
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer
from openai import AsyncOpenAI

from multilora.demo import base_model_path
from multilora.errors import ConfigError
from multilora.front.tokenizer import Tokenizer

TOKENIZER = byte_level_tokenizer()
EOS = 1
HELLO = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
UNITS = {"type": "object", "properties": {"metric": {"type": "boolean"}}, "required": ["metric"]}


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters} | more}


WEATHER, SET_UNITS = tool("weather", CITY, strict=True), tool("set_units", UNITS)
TOOLS = [WEATHER, SET_UNITS]
NAMED = {"type": "function", "function": {"name": "weather"}}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
LLAMA3 = '{"name": "weather", "parameters": {"city": "Rome"}}'


def fake(text: str, tokenizer: Any = TOKENIZER, **config: Any) -> LocalServer:
    answer = [*tokenizer.encode(text)[1:], EOS]
    client = FakeEngineClient(
        vocab_size=320, context_length=4096, eos_token_ids=(EOS,), answer=lambda submit: list(answer)
    )
    return LocalServer(client, tokenizer, **config)


def chat(server: Any, **body: Any) -> Any:
    return server.post("/v1/chat/completions", {"model": "base", "messages": HELLO} | body)


def joined(frames: list[Any]) -> dict[str, Any]:
    """The message that a client makes of a stream, as OpenAI's own does."""
    message: dict[str, Any] = {"content": "", "reasoning_content": ""}
    calls: list[dict[str, Any]] = []
    for frame in frames:
        [choice] = frame["choices"]
        delta = choice["delta"]
        for key in message:
            message[key] += delta.get(key) or ""
        for piece in delta.get("tool_calls", ()):
            if piece["index"] == len(calls):
                assert piece.keys() == {"index", "id", "type", "function"}
                calls.append({"id": piece["id"], "type": piece["type"], "function": dict(piece["function"])})
            else:
                assert piece.keys() == {"index", "function"} and piece["function"].keys() == {"arguments"}
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return message | {"tool_calls": calls, "finish_reason": frames[-1]["choices"][0]["finish_reason"]}


def without_ids(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ids = [call["id"] for call in calls]
    assert len(set(ids)) == len(ids) and all(call_id.startswith("call_") for call_id in ids)
    return [{key: value for key, value in call.items() if key != "id"} for call in calls]


@pytest.fixture(scope="module")
def demo():
    door = HttpDoor(base_model_path(), served_model_name="base", context_length=512)
    yield door
    door.close()


class Demo:
    """Forced calls: the grammar makes any model obey."""

    def __init__(self, door: HttpDoor):
        self._door = door

    def post(self, path: str, body: dict[str, Any]) -> Any:
        limits = {"temperature": 1, "seed": 1, "max_tokens": 200, "tools": TOOLS}
        return self._door.post(path, limits | body)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls(demo, choice):
    whole = chat(Demo(demo), tool_choice=choice, logprobs=True).json()
    [one] = whole["choices"]
    assert one["finish_reason"] == "tool_calls"
    message = one["message"]
    assert message["role"] == "assistant" and message["content"] is None
    calls = message["tool_calls"]
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "weather":
            assert arguments["city"] in ("Rome", "Oslo")
        else:
            assert isinstance(arguments["metric"], bool)
    assert choice == "required" or [call["function"]["name"] for call in calls] == ["weather"]
    assert whole["usage"]["completion_tokens"] == len(one["logprobs"]["content"])

    frames = chat(Demo(demo), tool_choice=choice, logprobs=True, stream=True).frames
    streamed = joined(frames)
    assert streamed["finish_reason"] == "tool_calls"
    assert streamed["content"] == ""
    assert without_ids(streamed["tool_calls"]) == without_ids(calls)
    logprobs = [e for f in frames for e in (f["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert logprobs == one["logprobs"]["content"]


def test_one_call_at_most_without_parallel_calls(demo):
    body = chat(Demo(demo), tool_choice="required", parallel_tool_calls=False).json()
    assert len(body["choices"][0]["message"]["tool_calls"]) == 1


def test_a_forced_call_cut_by_a_limit_is_content(demo):
    [choice] = chat(Demo(demo), tool_choice=NAMED, max_tokens=2).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] and "tool_calls" not in choice["message"]
    streamed = joined(chat(Demo(demo), tool_choice=NAMED, max_tokens=2, stream=True).frames)
    assert streamed["finish_reason"] == "length" and streamed["content"] == ""


FORMATS = {"hermes": HERMES, "llama3_json": LLAMA3}


@pytest.mark.parametrize("parser", FORMATS)
def test_auto_calls(parser):
    text = FORMATS[parser]
    server = fake(text, tool_call_parser=parser)
    [choice] = chat(server, tools=TOOLS).json()["choices"]
    called = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
    assert without_ids(choice["message"]["tool_calls"]) == called
    streamed = joined(chat(server, tools=TOOLS, tool_choice="auto", stream=True).frames)
    assert without_ids(streamed.pop("tool_calls")) == called
    assert streamed == {"content": "", "reasoning_content": "", "finish_reason": "tool_calls"}


def test_calls_of_the_template_are_parsed_without_a_flag():
    tokenizer = byte_level_tokenizer()
    tokenizer.hf.chat_template = '{{ messages[0].content }}{# <tool_call>{"name": …, "arguments": …}</tool_call> #}'
    [choice] = chat(fake(HERMES, tokenizer), tools=TOOLS).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"


def test_text_before_calls_is_content_and_the_first_call_may_be_the_only_one():
    server = fake("So: " + HERMES + HERMES, tool_call_parser="hermes")
    message = chat(server, tools=TOOLS).json()["choices"][0]["message"]
    assert message["content"] == "So:" and len(message["tool_calls"]) == 2
    message = chat(server, tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1
    streamed = joined(chat(server, tools=TOOLS, parallel_tool_calls=False, stream=True).frames)
    assert streamed["content"] == "So:" and len(streamed["tool_calls"]) == 1


@pytest.mark.parametrize("body", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_nothing_is_a_call(body):
    [choice] = chat(fake(HERMES, tool_call_parser="hermes"), **body).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": HERMES, "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_without_a_known_format_calls_are_content():
    [choice] = chat(fake(HERMES), tools=TOOLS).json()["choices"]
    assert choice["message"]["content"] == HERMES and "tool_calls" not in choice["message"]


def test_a_broken_call_is_content_in_a_stream_too():
    broken = '<tool_call>\n{"name": "weather", "arguments": {"city": oops}}\n</tool_call>'
    server = fake(broken, tool_call_parser="hermes")
    [choice] = chat(server, tools=TOOLS).json()["choices"]
    assert choice["message"]["content"] == broken and choice["finish_reason"] == "stop"
    streamed = joined(chat(server, tools=TOOLS, stream=True).frames)
    assert streamed["content"] == broken and streamed["finish_reason"] == "stop"


def with_special_tokens(*tokens: str) -> Tokenizer:
    hf = copy.deepcopy(TOKENIZER.hf)
    hf.add_special_tokens({"additional_special_tokens": list(tokens)})
    return Tokenizer(hf)


def test_markers_that_are_special_tokens_reach_the_parser():
    tokenizer = with_special_tokens("<|python_tag|>", "<|other|>")
    server = fake("<|other|><|python_tag|>" + LLAMA3, tokenizer, tool_call_parser="llama3_json")
    message = chat(server, tools=TOOLS).json()["choices"][0]["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"]["name"] == "weather"
    assert chat(server).json()["choices"][0]["message"]["content"] == LLAMA3


def test_thoughts():
    server = fake("<think>\nhm\n</think>\n\n" + HERMES, reasoning_parser="qwen3", tool_call_parser="hermes")
    message = chat(server, tools=TOOLS).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "hm" and message["content"] is None
    assert len(message["tool_calls"]) == 1
    streamed = joined(chat(server, tools=TOOLS, stream=True).frames)
    assert streamed["reasoning_content"] == "hm" and len(streamed["tool_calls"]) == 1
    whole = chat(server, tools=TOOLS, separate_reasoning=False).json()["choices"][0]["message"]
    assert whole["content"].startswith("<think>") and "reasoning_content" not in whole


def test_thoughts_that_the_prompt_opens():
    tokenizer = byte_level_tokenizer()
    tokenizer.hf.chat_template = "{{ messages[0].content }}<think>\n"
    message = chat(fake("hm</think>yes", tokenizer, reasoning_parser="qwen3")).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    message = chat(fake("yes", reasoning_parser="qwen3")).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (None, "yes")


def test_logprobs_come_once_and_whole():
    server = fake(HERMES, tool_call_parser="hermes")
    content = chat(server, tools=TOOLS, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    frames = chat(server, tools=TOOLS, logprobs=True, stream=True).frames
    assert [e for f in frames for e in (f["choices"][0]["logprobs"] or {"content": []})["content"]] == content


def test_the_template_sees_calls_of_earlier_turns_as_objects():
    tokenizer = byte_level_tokenizer()
    tokenizer.hf.chat_template = (
        "{% for m in messages %}{{ m.content }};{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"
    )
    server = fake("ok", tokenizer)
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "assistant", "content": "nice", "tool_calls": []},
    ]
    assert chat(server, messages=messages, tools=TOOLS).status == 200
    assert tokenizer.decode(server.client.submitted[0].input_ids) == "hi;;city=Romesunny;nice;"


BAD = [
    ({"tools": "weather"}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
    ({"tools": [tool("a b", CITY)]}, "tools[0].function.name"),
    ({"tools": [tool("f", {"type": "array"})]}, "tools[0].function.parameters"),
    ({"tools": [tool("f", CITY, strict="yes")]}, "tools[0].function.strict"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice.function.name"),
    ({"tools": [SET_UNITS], "tool_choice": NAMED}, "tool_choice.function.name"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": 1}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": NAMED, "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    (
        {"tools": [tool("f", {"properties": {"x": {"type": "varchar"}}})], "tool_choice": "required"},
        "tools[0].function.parameters.properties.x.type",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_input(body, param):
    server = fake("x")
    answer = chat(server, **body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.text
    assert server.client.submitted == []


@pytest.mark.parametrize("flag", ["tool_call_parser", "reasoning_parser"])
def test_unknown_parsers_are_refused_at_start(flag):
    with pytest.raises(ConfigError, match=flag.replace("_", "-")):
        fake("x", **{flag: "nope"})


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_openais_own_client(demo, choice):
    """The stream's final message, which the client puts together itself, is the whole answer's."""

    async def both() -> list[Any]:
        transport = httpx.ASGITransport(demo.server.app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = AsyncOpenAI(api_key="-", base_url="http://test/v1", http_client=http)
            body = {
                "model": "base",
                "messages": HELLO,
                "tools": TOOLS,
                "tool_choice": choice,
                "temperature": 1,
                "seed": 1,
            }
            whole = await client.chat.completions.create(**body)
            async with client.chat.completions.stream(**body) as stream:
                return [whole.choices[0], (await stream.get_final_completion()).choices[0]]

    whole, streamed = demo.run(both())
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    assert whole.message.content is None and not streamed.message.content
    functions = [
        [(c.type, c.function.name, json.loads(c.function.arguments)) for c in one.message.tool_calls]
        for one in (whole, streamed)
    ]
    assert functions[0] == functions[1] and functions[0][0][0] == "function"
