"""POST /generate: one and many, adapters per item, logprobs, streams, and what it refuses.

Covers `bodies.py` too.
"""

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer

from multilora.engine.messages import Submit

TOKENIZER = byte_level_tokenizer()
EOS = 1


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)[1:]


def by_adapter(submit: Submit) -> list[int]:
    """The answer says which version made it."""
    return [*ids(f"the end {submit.adapters[0][0] if submit.adapters else 0}"), EOS]


def server(answer=by_adapter, tokenizer=TOKENIZER, **config):
    return LocalServer(FakeEngineClient(vocab_size=320, eos_token_ids=(EOS,), answer=answer), tokenizer, **config)


def generate(s, **body):
    return s.post("/generate", body)


def test_one_prompt_is_one_object():
    s = server()
    answer = generate(s, text="hi", rid="mine")
    assert answer.status == 200
    body = answer.json()
    assert body["text"] == "the end 0"
    assert body["output_ids"] == [*ids("the end 0"), EOS]
    meta = body["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "stop", "matched": EOS}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids("hi")) + 1, len(body["output_ids"]))
    assert meta["e2e_latency"] > 0
    assert {"cached_tokens", "weight_version"} <= set(meta)
    assert s.client.submitted[0].input_ids == TOKENIZER.encode("hi")
    assert s.client.submitted[0].sampling.max_new_tokens == 128


def test_a_list_is_answered_in_order_each_item_by_its_adapter():
    s = server()
    s.load("a", "b")
    body = generate(s, text=["x", "y", "z"], lora_path=["b", None, "a"]).json()
    assert [item["text"] for item in body] == ["the end 2", "the end 0", "the end 1"]
    body = generate(s, input_ids=[[5, 6], [7]], lora_path="b").json()
    assert [item["text"] for item in body] == ["the end 2", "the end 2"]
    assert [m.input_ids for m in s.client.submitted[-2:]] == [[5, 6], [7]]


def test_a_list_of_one_is_a_list():
    assert len(generate(server(), text=["x"]).json()) == 1
    assert len(generate(server(), input_ids=[[5]]).json()) == 1
    assert isinstance(generate(server(), input_ids=[5]).json(), dict)


def test_sampling_params_per_item():
    s = server()
    params = [{"temperature": 0}, {"max_new_tokens": 2}, None]
    body = generate(s, text=["x", "y", "z"], sampling_params=params).json()
    assert [m.sampling.temperature for m in s.client.submitted] == [0, 1, 1]
    assert body[1]["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


def test_n_answers_are_ordered_sample_by_sample_and_have_seeds_of_their_own():
    s = server(answer=lambda m: [10 + m.input_ids[0] + m.sampling.sampling_seed])
    params = {"n": 2, "sampling_seed": 100, "max_new_tokens": 1}
    body = generate(s, input_ids=[[5], [6]], sampling_params=params, rid="r").json()
    assert [item["output_ids"] for item in body] == [[115], [116], [116], [117]]
    assert [item["meta_info"]["id"] for item in body] == ["r#0", "r#1", "r#2", "r#3"]
    assert len(generate(s, input_ids=[5], sampling_params=params).json()) == 2
    assert all(m.sampling.n == 1 for m in s.client.submitted)


def test_stop_string_cuts_text_and_tokens_and_tells_the_engine():
    s = server(answer=lambda m: ids("hello the end"))
    body = generate(s, text="x", rid="r", sampling_params={"stop": "the"}).json()
    assert body["text"] == "hello "
    assert body["output_ids"] == ids("hello the")
    assert body["meta_info"]["finish_reason"] == {"type": "stop", "matched": "the"}
    assert s.client.finished == [s.client.submitted[0].rid]
    assert s.client.aborted == []


def test_logprobs():
    s = server(answer=lambda m: ids("a"))
    wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    meta = generate(s, text="b", **wanted).json()["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 0, "<s>"], [-0.25, ids("b")[0], "b"]]
    assert meta["output_token_logprobs"] == [[-0.5, ids("a")[0], "a"]]
    top = [[-0.5, 3, TOKENIZER.token_text(3)], [-1.5, 4, TOKENIZER.token_text(4)]]
    assert meta["input_top_logprobs"] == [None, top]
    assert meta["output_top_logprobs"] == [top]
    meta = generate(s, input_ids=[0, 5], return_logprob=True).json()["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert meta["output_token_logprobs"] == [[-0.5, ids("a")[0], None]]
    assert "output_token_logprobs" not in generate(s, text="b").json()["meta_info"]
    body = generate(s, text=["b", "b"], return_logprob=[True, False], logprob_start_len=[1, -1]).json()
    assert len(body[0]["meta_info"]["input_token_logprobs"]) == 1
    assert "input_token_logprobs" not in body[1]["meta_info"]


def test_stream_is_cumulative_and_ends_with_done():
    s = server(answer=lambda m: [*ids("abc"), EOS])
    answer = generate(s, text="x", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.frames
    assert [f["text"] for f in frames] == ["a", "ab", "abc", "abc"]
    assert frames[-1]["output_ids"] == [*ids("abc"), EOS]
    reasons = [f["meta_info"]["finish_reason"] for f in frames]
    assert reasons == [None, None, None, {"type": "stop", "matched": EOS}]
    assert all("index" not in f for f in frames)


def test_frames_of_a_batch_carry_the_index():
    s = server()
    s.load("a")
    frames = generate(s, text=["x", "y"], lora_path=["a", None], stream=True).frames
    last = {f["index"]: f["text"] for f in frames}
    assert last == {0: "the end 1", 1: "the end 0"}
    assert sum(f["meta_info"]["finish_reason"] is not None for f in frames) == 2


def test_the_answer_ends_at_the_context():
    s = server(answer=lambda m: [5] * 1000)
    body = generate(s, input_ids=[5] * 250, sampling_params={"max_new_tokens": 100}).json()
    assert body["meta_info"]["finish_reason"] == {"type": "length", "length": 6}


def test_without_tokenizer_ids_go_in_and_out():
    s = server(tokenizer=None)
    body = generate(s, input_ids=[5]).json()
    assert body["text"] == ""
    assert body["output_ids"] == [*ids("the end 0"), EOS]
    assert "tokenizer" in generate(s, text="x").error["message"]
    assert "tokenizer" in generate(s, input_ids=[5], sampling_params={"stop": "x"}).error["message"]
    assert "tokenizer" in generate(s, input_ids=[5], sampling_params={"regex": "x"}).error["message"]
    assert "tokenizer" in generate(s, input_ids=[5], return_text_in_logprobs=True).error["message"]


def test_a_grammar_goes_along_compiled():
    s = server()
    assert generate(s, text="x", sampling_params={"regex": "[0-9]+"}).status == 200
    assert s.client.submitted[0].grammar
    assert s.client.submitted[0].sampling.regex is None


BAD = {
    "neither text nor ids": ({}, "text"),
    "both": ({"text": "a", "input_ids": [5]}, "text"),
    "no prompts": ({"text": []}, "text"),
    "empty ids": ({"input_ids": []}, "empty"),
    "mixed lists": ({"input_ids": [[5], 6]}, "input_ids"),
    "id as text": ({"input_ids": ["5"]}, "input_ids"),
    "half an id": ({"input_ids": [5.5]}, "input_ids"),
    "id as a bool": ({"input_ids": [True]}, "input_ids"),
    "number as text": ({"text": 5}, "text"),
    "long lora_path": ({"text": "a", "lora_path": ["a", "a"]}, "lora_path has 2 entries for 1"),
    "sampling_params as text": ({"text": "a", "sampling_params": "x"}, "sampling_params"),
    "infinite temperature": (b'{"text": "a", "sampling_params": {"temperature": 1e400}}', "not valid JSON"),
    "enormous top_k": ({"text": "a", "sampling_params": {"top_k": 10**30}}, "top_k"),
    "different n": ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "the same"),
    "stream as text": ({"text": "a", "stream": "yes"}, "stream"),
    "unknown field": ({"text": "a", "lora": "x"}, "lora: not supported"),
    "images": ({"text": "a", "image_data": ["x"]}, "image_data: not supported"),
    "empty rid": ({"text": "a", "rid": ""}, "rid"),
    "the same rid twice": ({"text": ["a", "b"], "rid": ["r", "r"]}, "rid"),
    "too few rids": ({"text": ["a", "b"], "rid": ["r"]}, "rid has 1 entries"),
}


@pytest.mark.parametrize(("body", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named_and_changes_nothing(body, words):
    s = server()
    s.load("a")
    answer = s.post("/generate", body)
    assert answer.status == 400, answer.text
    assert words in answer.error["message"]
    assert s.client.submitted == []
    assert s.registry.num_requests(1) == 0


def test_sglangs_fields_are_tolerated_when_empty():
    unused = {"image_data": None, "audio_data": [], "session_params": {}, "return_hidden_states": False}
    assert generate(server(), text="a", log_metrics=True, modalities=["image"], **unused).status == 200


def test_more_adapters_than_can_be_loaded():
    s = server(max_loaded_loras=1)
    s.load("a", "b")
    assert generate(s, text=["x", "y", "z"], lora_path=["a", "a", None]).status == 200
    answer = generate(s, text=["x", "y"], lora_path=["a", "b"])
    assert answer.status == 400
    assert "2 adapters" in answer.error["message"]
