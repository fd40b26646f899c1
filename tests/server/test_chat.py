"""POST /v1/chat/completions: the template, shapes, logprobs, tools, streams.

Covers `chat_job.py`, `chat_answer.py` too.
"""

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
EOS = 1
HELLO = [{"role": "user", "content": "hi"}]


def server(text="ab", tokenizer=TOKENIZER):
    answer = [*TOKENIZER.encode(text)[1:], EOS]
    client = FakeEngineClient(vocab_size=320, eos_token_ids=(EOS,), answer=lambda m: answer)
    return LocalServer(client, tokenizer)


def chat(s, **body):
    return s.post("/v1/chat/completions", {"model": "base", "messages": HELLO} | body)


def test_the_whole_body():
    s = server()
    body = chat(s).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ab", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert s.client.submitted[0].input_ids == TOKENIZER.encode_chat(HELLO)
    assert body["usage"]["prompt_tokens"] == len(TOKENIZER.encode_chat(HELLO))
    room = 256 - len(TOKENIZER.encode_chat(HELLO))
    assert s.client.submitted[0].sampling.max_new_tokens == room


def test_text_parts_are_joined():
    s = server()
    chat(s, messages=[{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}])
    assert s.client.submitted[0].input_ids == TOKENIZER.encode_chat([{"role": "user", "content": "h\ni"}])


def test_a_prefix_of_the_answer_can_be_given():
    s = server()
    messages = [*HELLO, {"role": "assistant", "content": "so"}]
    assert chat(s, messages=messages, continue_final_message=True).status == 200
    wanted = TOKENIZER.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert s.client.submitted[0].input_ids == wanted


@pytest.mark.parametrize("content", ["so", [{"type": "text", "text": "s"}, {"type": "text", "text": "o"}]])
def test_echo_puts_the_last_message_before_the_answer_if_it_is_the_assistants(content):
    s, text = server(), "so" if isinstance(content, str) else "s\no"
    messages = [*HELLO, {"role": "assistant", "content": content}]
    for body in ({}, {"continue_final_message": True}):
        answer = chat(s, messages=messages, echo=True, **body).json()["choices"][0]["message"]["content"]
        assert answer == text + "ab"
        frames = chat(s, messages=messages, echo=True, stream=True, **body).frames
        assert frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": text}
        assert "".join(f["choices"][0]["delta"].get("content", "") for f in frames) == answer
    assert chat(s, echo=True).json()["choices"][0]["message"]["content"] == "ab"
    assert chat(s, messages=messages, echo=False).json()["choices"][0]["message"]["content"] == "ab"


def test_special_tokens_before_the_template():
    s = server()
    for special in (None, False, True):
        assert chat(s, add_special_tokens=special).status == 200
    plain, same, with_special = (m.input_ids for m in s.client.submitted)
    assert plain == same == with_special[1:] == TOKENIZER.encode_chat(HELLO)
    assert with_special[0] == TOKENIZER.encode("x")[0]


def test_stream():
    frames = chat(server(), stream=True, stream_options={"include_usage": True}).frames
    assert {f["object"] for f in frames} == {"chat.completion.chunk"}
    assert [f["choices"][0]["delta"] for f in frames[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert [f["choices"][0]["finish_reason"] for f in frames[:-1]] == [None, None, None, "stop"]
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["completion_tokens"] == 3


def test_token_ids_whole_and_streamed():
    s = server()
    whole = chat(s, return_token_ids=True, n=2).json()
    assert whole["prompt_token_ids"] == TOKENIZER.encode_chat(HELLO)
    assert [choice["token_ids"] for choice in whole["choices"]] == [[*TOKENIZER.encode("ab")[1:], EOS]] * 2
    first, *rest = chat(s, return_token_ids=True, stream=True).frames
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("prompt_token_ids" not in frame for frame in rest)
    streamed = [token for frame in rest for token in frame["choices"][0].get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]
    plain = chat(s).json()
    assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]


def test_tokens_as_token_ids():
    s = server()
    choice = chat(s, logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{i}" for i in (*TOKENIZER.encode("ab")[1:], EOS)]
    assert [entry["bytes"] for entry in content] == [list(b"a"), list(b"b"), list(b"</s>")]
    assert content[0]["top_logprobs"][0]["token"] == "token_id:3"


def test_continuous_usage():
    options = {"include_usage": True, "continuous_usage_stats": True}
    *frames, last = chat(server(), stream=True, stream_options=options).frames
    assert [frame["usage"]["completion_tokens"] for frame in frames] == [1, 1, 2, 3]
    assert frames[-1]["usage"] == last["usage"]


def test_stream_of_two_answers():
    frames = chat(server(), stream=True, n=2).frames
    for index in range(2):
        deltas = [f["choices"][0]["delta"] for f in frames if f["choices"][0]["index"] == index]
        assert deltas[0]["role"] == "assistant"
        assert "".join(d.get("content", "") for d in deltas) == "ab"


def test_logprobs():
    s = server("é")
    content = chat(s, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    top = {"token": TOKENIZER.token_text(3), "logprob": -0.5, "bytes": list(TOKENIZER.token_text(3).encode())}
    assert all(entry["top_logprobs"] == [top] for entry in content)
    assert all(entry["bytes"] == list(entry["token"].encode()) for entry in content)
    streamed = []
    for frame in chat(s, logprobs=True, top_logprobs=1, stream=True).frames:
        streamed += (frame["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == content


def test_max_completion_tokens():
    s = server("hello there")
    assert chat(s, max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2
    assert chat(s, max_tokens=2, max_completion_tokens=2).status == 200
    assert chat(s, max_tokens=2, max_completion_tokens=3).status == 400


def test_tools_go_into_the_template():
    template = "{% for t in tools or [] %}{{ t['function']['name'] }}{% endfor %}{{ messages[0]['content'] }}"
    tokenizer = byte_level_tokenizer()
    tokenizer.hf.chat_template = template
    s = server(tokenizer=tokenizer)
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
    assert chat(s, tools=tools, tool_choice="auto").status == 200
    assert chat(s, tools=tools, tool_choice="none").status == 200
    assert [m.input_ids for m in s.client.submitted] == [TOKENIZER.encode(text)[1:] for text in ("findhi", "hi")]


BAD = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"temperature": "hot"}, "temperature"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_input(body, param):
    s = server()
    answer = chat(s, **body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.text
    assert s.client.submitted == []


def test_no_template_and_no_tokenizer():
    tokenizer = byte_level_tokenizer()
    tokenizer.hf.chat_template = None
    assert "no chat template" in chat(server(tokenizer=tokenizer)).error["message"]
    assert "tokenizer" in chat(server(tokenizer=None)).error["message"]
