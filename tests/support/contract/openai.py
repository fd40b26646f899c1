"""The OpenAI routes: completions and chats."""

import json

from .table import Section
from .world import BASE, CHAT, COMPLETION, TEXT, few, local

line = Section("openai", "OpenAI routes")

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
EMPTY_OBJECT = {"type": "object", "properties": {}, "additionalProperties": False}


@line
def completions(server):
    """`/v1/completions` answers with OpenAI's object and the usage counts."""
    found = server.complete()
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(found)
    assert found["object"] == "text_completion"
    [choice] = found["choices"]
    assert {"index", "text", "logprobs", "finish_reason"} <= set(choice)
    assert choice["finish_reason"] == "length"
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 2, 6)


@line
def chats(server):
    """`/v1/chat/completions` answers with OpenAI's object and the usage counts."""
    found = server.chat()
    assert found["object"] == "chat.completion"
    [choice] = found["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 2


@line
def streams(server):
    """Streams have deltas that add up to the whole answer, then `[DONE]`."""
    whole = server.complete(max_tokens=3)["choices"][0]["text"]
    chunks = server.events(COMPLETIONS, COMPLETION | {"max_tokens": 3})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    chunks = server.events(CHATS, CHAT)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    whole = server.chat()["choices"][0]["message"]["content"]
    assert "".join(delta.get("content") or "" for delta in deltas) == whole


@line
def usage_of_streams(server):
    """`stream_options.include_usage` ends a stream with a chunk without choices that has the counts."""
    for path, body in ((COMPLETIONS, COMPLETION), (CHATS, CHAT)):
        *others, last = server.events(path, body | {"stream_options": {"include_usage": True}})
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)
        assert all(chunk["usage"] is None for chunk in others if "usage" in chunk)


@line
def samples(server):
    """`n` makes as many choices, numbered."""
    sampled = {"n": 2, "temperature": 1.0, "max_tokens": 1}
    assert [choice["index"] for choice in server.complete(**sampled)["choices"]] == [0, 1]
    assert [choice["index"] for choice in server.chat(**sampled)["choices"]] == [0, 1]


@line
def stop_strings(server):
    """`stop` ends an answer before the string, with `stop`."""
    first, second = ([t["token"] for t in server.chat(logprobs=True)["choices"][0]["logprobs"]["content"]])[:2]
    choice = server.chat(stop=[second])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (first, "stop")


@line
def logprobs(server):
    """`logprobs` are k alternatives on completions, and with `top_logprobs` lists of tokens in chats."""
    found = server.complete(logprobs=2)["choices"][0]["logprobs"]
    assert {"tokens", "token_logprobs", "top_logprobs", "text_offset"} == set(found)
    assert [len(top) for top in found["top_logprobs"]] == [2, 2]
    content = server.chat(logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(content) == 2
    for token in content:
        assert {"token", "logprob", "bytes", "top_logprobs"} <= set(token)
        assert len(token["top_logprobs"]) == 3


@line
def echo(server):
    """`echo` puts the prompt before the answer, with its logprobs when they are asked for."""
    found = server.complete(echo=True, logprobs=1)["choices"][0]
    assert found["text"].startswith(TEXT)
    assert found["logprobs"]["token_logprobs"][0] is None
    assert len(found["logprobs"]["tokens"]) == 6


@line
def seeds(server):
    """`seed` makes a sampled answer repeatable."""
    sampled = {"seed": 5, "temperature": 2.0, "max_tokens": 3}
    assert server.complete(**sampled)["choices"] == server.complete(**sampled)["choices"]


@line
def logit_bias(server):
    """`logit_bias` by token id moves what is chosen."""
    found = server.complete(logit_bias={"9": 100}, return_token_ids=True)
    assert found["choices"][0]["token_ids"] == [9, 9]


@line
def response_formats(server):
    """`response_format` is `text`, `json_object` or `json_schema`; the answer follows it."""
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": EMPTY_OBJECT}}
    found = server.chat(response_format=schema, max_tokens=12)["choices"][0]["message"]["content"]
    assert json.loads(found) == {}
    found = server.chat(response_format={"type": "json_object"}, max_tokens=3)["choices"][0]["message"]["content"]
    assert found.lstrip().startswith("{")
    assert server.chat(response_format={"type": "text"}) != ""
    server.refused(CHATS, CHAT | {"response_format": {"type": "yaml"}}, "response_format", "yaml")


@line
def sampling_defaults():
    """Sampling follows the model's `generation_config`, unless `--sampling-defaults openai` says otherwise."""
    for given, temperature in (("model", 0.25), ("openai", 1.0)):
        s = local({"temperature": 0.25}, sampling_defaults=given)
        s.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1})
        assert s.client.submitted[-1].sampling.temperature == temperature


@line
def error_bodies(server):
    """An error has OpenAI's body: message, type, param and code."""
    error = server.refused(COMPLETIONS, COMPLETION | {"temperature": -1}, "temperature", "-1")
    assert (error["type"], error["param"]) == ("invalid_request_error", "temperature")
    error = server.refused(COMPLETIONS, {"model": BASE}, "prompt")
    assert error["param"] == "prompt"
    server.refused("/v1/nothing", {}, "/v1/nothing", status=404)


@line
def named_calls(server):
    """`tool_choice` by name makes a call of any model, in streams too."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": EMPTY_OBJECT}}]
    body = {"tools": tools, "max_tokens": 20, "tool_choice": {"type": "function", "function": {"name": "f"}}}
    found = server.chat(**body)["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    [call] = found["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "function",
        "f",
        {},
    )
    chunks = server.events(CHATS, CHAT | body)
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls") or []]
    assert calls[0]["function"]["name"] == "f"
    assert json.loads("".join(call["function"].get("arguments") or "" for call in calls)) == {}


line.elsewhere(
    "required-calls",
    '`tool_choice` "required" makes one call or more of any model, as `parallel_tool_calls` says.',
    "tests/server/test_chat_tools.py::test_forced_calls",
)
line.elsewhere(
    "calls-of-earlier-turns",
    "`tool_calls[].function.arguments` reaches the chat template as an object; empty `tool_calls` are dropped.",
    "tests/server/test_chat_tools.py::test_the_template_sees_calls_of_earlier_turns_as_objects",
)
line.elsewhere(
    "calls-of-the-model",
    "Calls in a model's own format are parsed, by `--tool-call-parser` or as the chat template teaches.",
    "tests/server/test_chat_tools.py::test_auto_calls",
)


@line
def usage_on_every_chunk(server):
    """`stream_options.continuous_usage_stats` puts the counts so far on every chunk."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = server.events(COMPLETIONS, COMPLETION | {"stream_options": options})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2]


@line
def structured_outputs(server):
    """vLLM's `structured_outputs` takes `json`, `regex`, `choice`, `grammar`, `structural_tag`."""
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "ab"}}
    forms = {"json": {"const": 5}, "regex": "5", "choice": ["5"], "grammar": 'root ::= "5"'}
    for form, value in forms.items():
        assert server.complete(structured_outputs={form: value}, max_tokens=4)["choices"][0]["text"] == "5", form
    found = server.complete(structured_outputs={"structural_tag": json.dumps(tag)}, max_tokens=4)
    assert found["choices"][0]["text"] == "ab"


@line
def guided(server):
    """vLLM's older `guided_json`, `guided_regex`, `guided_choice` and `guided_grammar` mean the same."""
    forms = {"json": {"const": 5}, "regex": "5", "choice": ["5"], "grammar": 'root ::= "5"'}
    for form, value in forms.items():
        found = server.complete(**{f"guided_{form}": value}, max_tokens=4)
        assert found["choices"][0]["text"] == "5", form


@line
def token_ids(server):
    """`return_token_ids` gives `token_ids` of each choice and `prompt_token_ids`."""
    choice = server.complete(return_token_ids=True)["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (server.native()["output_ids"], [1, 55, 32, 435])
    found = server.chat(return_token_ids=True)
    assert len(found["choices"][0]["token_ids"]) == 2
    assert found["prompt_token_ids"]


@line
def tokens_as_token_ids(server):
    """`return_tokens_as_token_ids` names tokens `token_id:123` in logprobs."""
    ids = server.native()["output_ids"]
    found = server.complete(logprobs=1, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert found["tokens"] == [f"token_id:{token}" for token in ids]


@line
def prompt_logprobs(server):
    """`prompt_logprobs` k is a map for each prompt token, the first null; 0 means the prompt's own."""
    for k in (0, 2):
        first, *others = server.complete(prompt_logprobs=k)["choices"][0]["prompt_logprobs"]
        assert first is None
        assert [next(iter(one)) for one in others] == ["55", "32", "435"]
        for one in others:
            assert k <= len(one) <= k + 1
            assert all(set(entry) == {"logprob", "rank", "decoded_token"} for entry in one.values())


@line
def logprobs_as_a_boolean(server):
    """`logprobs: true` on completions is 1."""
    assert server.complete(logprobs=True) | {"id": "", "created": 0} == server.complete(logprobs=1) | {
        "id": "",
        "created": 0,
    }


@line
def logprobs_modes(server):
    """`logprobs_mode` is `raw` or `processed`, per request; other modes are 400."""
    sampled = {"temperature": 0.01, "logprobs": 1, "max_tokens": 1, "prompt": "The"}
    raw, processed = (
        server.complete(**sampled, logprobs_mode=mode)["choices"][0]["logprobs"]["token_logprobs"][0]
        for mode in ("raw", "processed")
    )
    assert raw < processed <= 0
    server.refused(COMPLETIONS, COMPLETION | {"logprobs_mode": "raw_logits"}, "logprobs_mode", "raw_logits")


@line
def cache_namespaces(server):
    """`cache_salt` and SGLang's `extra_key` are namespaces of the prefix cache."""
    prompt = [8 + i % 80 for i in range(40)]

    def cached(**names):
        return server.native({"max_new_tokens": 1}, input_ids=prompt, **names)["meta_info"]["cached_tokens"]

    assert (cached(), cached()) == (0, 32)
    assert (cached(cache_salt="a"), cached(cache_salt="a")) == (0, 32)
    assert (cached(extra_key="a"), cached(extra_key="a")) == (0, 32)


@line
def priorities(server):
    """`priority` is taken on every route."""
    assert server.complete(priority=-3)
    assert server.chat(priority=3)
    assert server.post("/generate", {"text": TEXT, "sampling_params": few(), "priority": 1})
