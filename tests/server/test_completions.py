"""POST /v1/completions: shapes, echo, logprobs, usage, streams."""

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
EOS = 1


def ids(text):
    return TOKENIZER.encode(text)[1:]


def server(text="hello", tokenizer=TOKENIZER):
    client = FakeEngineClient(vocab_size=320, eos_token_ids=(EOS,), answer=lambda m: [*ids(text), EOS])
    return LocalServer(client, tokenizer)


def complete(s, **body):
    return s.post("/v1/completions", {"model": "base", "prompt": "x"} | body)


def test_the_whole_body():
    s = server()
    body = complete(s).json()
    assert body["id"].startswith("cmpl-")
    assert body["created"] > 0
    del body["id"], body["created"]
    count = len(ids("hello")) + 1
    assert body == {
        "object": "text_completion",
        "model": "base",
        "choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": count,
            "total_tokens": count + 2,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
        "metadata": {"weight_version": "default", "lora_version": None},
    }
    assert s.client.submitted[0].sampling.max_new_tokens == 16


def test_prompts_of_every_kind_and_n():
    s = server()
    for prompt, count in (("x", 1), (["x", "y"], 2), ([5, 6], 1), ([[5], [6, 7]], 2)):
        choices = complete(s, prompt=prompt, n=2).json()["choices"]
        assert [c["index"] for c in choices] == list(range(2 * count))
    assert [m.input_ids for m in s.client.submitted[-4:]] == [[5], [5], [6, 7], [6, 7]]
    usage = complete(s, prompt=[[5], [6, 7]], n=2, max_tokens=1).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 4)


def test_length():
    spec = complete(server(), max_tokens=1).json()["choices"][0]
    assert spec["finish_reason"] == "length"


def test_stop():
    s = server("one the two")
    spec = complete(s, stop=["the", "zzz"]).json()["choices"][0]
    assert (spec["text"], spec["finish_reason"]) == ("one ", "stop")
    spec = complete(s, stop="the", include_stop_str_in_output=True).json()["choices"][0]
    assert spec["text"] == "one the"


def test_echo():
    s = server()
    assert complete(s, echo=True).json()["choices"][0]["text"] == "xhello"
    assert complete(s, echo=True, prompt=ids("the end")).json()["choices"][0]["text"] == "the endhello"
    frames = complete(s, echo=True, stream=True, n=2).frames
    for index in range(2):
        text = "".join(f["choices"][0]["text"] for f in frames if f["choices"][0]["index"] == index)
        assert text == "xhello"


def test_echo_with_no_new_tokens_scores_the_prompt():
    s = server("")
    s.client.answer = lambda m: []
    spec = complete(s, echo=True, max_tokens=0, logprobs=1).json()["choices"][0]
    assert spec["text"] == "x"
    assert spec["logprobs"]["tokens"] == ["<s>", "x"]
    assert spec["logprobs"]["token_logprobs"] == [None, -0.25]
    assert spec["logprobs"]["top_logprobs"] == [None, {TOKENIZER.token_text(3): -0.5}]
    assert spec["finish_reason"] == "length"


def test_logprobs_whole_and_streamed_are_the_same():
    s = server("ab")
    whole = complete(s, logprobs=2).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == ["a", "b", "</s>"]
    assert whole["text_offset"] == [0, 1, 2]
    assert whole["top_logprobs"][0] == {TOKENIZER.token_text(3): -0.5, TOKENIZER.token_text(4): -1.5}
    joined = {name: [] for name in whole}
    for frame in complete(s, logprobs=2, stream=True).frames:
        for name, values in frame["choices"][0]["logprobs"].items():
            joined[name] += values
    assert joined == whole
    assert complete(s, logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"] is None


def test_stream():
    answer = complete(server("ab"), stream=True)
    frames = answer.frames
    assert {f["object"] for f in frames} == {"text_completion"}
    assert len({f["id"] for f in frames}) == 1
    assert [f["choices"][0] for f in frames] == [
        {"index": 0, "text": "a", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "b", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"},
    ]
    assert all("usage" not in f for f in frames)


def test_stream_with_usage():
    *frames, last = complete(server("ab"), stream=True, stream_options={"include_usage": True}).frames
    assert all(f["usage"] is None for f in frames)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_stream_with_usage_on_every_chunk():
    options = {"include_usage": True, "continuous_usage_stats": True}
    s = server("ab")
    *frames, last = complete(s, prompt=[[5], [6, 7]], stream=True, stream_options=options).frames
    for index, prompt_tokens in enumerate((1, 2)):
        usages = [f["usage"] for f in frames if f["choices"][0]["index"] == index]
        assert [usage["completion_tokens"] for usage in usages] == [1, 2, 3]
        assert all(usage["prompt_tokens"] == prompt_tokens for usage in usages)
        assert all(usage["total_tokens"] == prompt_tokens + usage["completion_tokens"] for usage in usages)
    assert (last["choices"], last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == ([], 3, 6)
    alone = complete(s, stream=True, stream_options={"continuous_usage_stats": True}).frames
    assert all("usage" not in frame for frame in alone)


def test_logprobs_as_a_boolean():
    s = server("ab")
    assert complete(s, logprobs=True).json()["choices"][0] == complete(s, logprobs=1).json()["choices"][0]
    assert complete(s, logprobs=False).json()["choices"][0]["logprobs"] is None


def test_logprobs_without_alternatives():
    found = complete(server("ab"), logprobs=0).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-0.5] * (len(ids("ab")) + 1)
    assert found["top_logprobs"] is None


def test_a_prompt_without_the_tokenizers_special_tokens():
    s = server()
    for special in (None, True, False):
        assert complete(s, prompt=["the end", "the"], add_special_tokens=special).status == 200
        both = [TOKENIZER.encode(text, add_special_tokens=special is not False) for text in ("the end", "the")]
        assert [m.input_ids for m in s.client.submitted[-2:]] == both
    assert len(ids("the end")) == len(TOKENIZER.encode("the end")) - 1
    assert complete(s, prompt=[5, 6], add_special_tokens=False).status == 200
    assert s.client.submitted[-1].input_ids == [5, 6]


def test_token_ids_whole_and_streamed():
    s = server("ab")
    for echo in (False, True):
        whole = complete(s, prompt=[[5], [6, 7]], return_token_ids=True, echo=echo).json()["choices"]
        assert [c["prompt_token_ids"] for c in whole] == [[5], [6, 7]]
        assert [c["token_ids"] for c in whole] == [[*ids("ab"), 1]] * 2
    frames = complete(s, prompt=[[5], [6, 7]], return_token_ids=True, stream=True).frames
    for index, prompt in enumerate(([5], [6, 7])):
        first, *rest = [f["choices"][0] for f in frames if f["choices"][0]["index"] == index]
        assert first["prompt_token_ids"] == prompt
        assert all("prompt_token_ids" not in choice for choice in rest)
        assert [token for choice in (first, *rest) for token in choice["token_ids"]] == [*ids("ab"), 1]
    assert "token_ids" not in complete(s).json()["choices"][0]


def test_tokens_without_text_have_a_chunk_of_their_own_when_ids_are_asked_for():
    s = server("")
    *begin, end = ids("漢")  # several tokens, one character
    assert begin
    s.client.answer = lambda m: [*begin, end, 1]
    frames = complete(s, return_token_ids=True, stream=True).frames
    assert [(f["choices"][0]["text"], f["choices"][0]["token_ids"]) for f in frames] == [
        *(("", [token]) for token in begin),
        ("漢", [end]),
        ("", [1]),
    ]


def test_tokens_as_token_ids():
    s = server("ab")
    plain, named = (
        complete(s, logprobs=1, return_tokens_as_token_ids=flag).json()["choices"][0]["logprobs"]
        for flag in (False, True)
    )
    assert named["tokens"] == [f"token_id:{i}" for i in (*ids("ab"), 1)]
    assert named["top_logprobs"][0] == {"token_id:3": -0.5}
    assert (named["token_logprobs"], named["text_offset"]) == (plain["token_logprobs"], plain["text_offset"])


BAD = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [999]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "}"}, "suffix"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 0.9}, "length_penalty"),
    ({"add_special_tokens": 1}, "add_special_tokens"),
    ({"echo": "yes"}, "echo"),
    ({"n": 0}, "n"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"stop": 5}, "stop"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_input(body, param):
    s = server()
    answer = complete(s, **body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.text
    assert s.client.submitted == []


def test_without_tokenizer():
    s = server(tokenizer=None)
    assert complete(s, prompt=[5]).status == 200
    assert complete(s).status == 400
    assert complete(s, prompt=[5], echo=True).status == 400
    assert complete(s, prompt=[5], logprobs=1).status == 400
