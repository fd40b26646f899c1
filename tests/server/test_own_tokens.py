"""An adapter with tokens of its own on every route: its text in and out, its limits, its end, its refusals."""

import asyncio
import threading

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import SECONDS, LocalServer, run
from fakes.tokenizers import byte_level_tokenizer, with_added_tokens

from multilora.front.tokenizer import Tokenizer
from multilora.lora_path import LoraPath

BASE = byte_level_tokenizer()
OWN = with_added_tokens(BASE, "<|call|>", eos="<|end|>")
SIZE = BASE.vocab_size  # rows of the base model; the adapter has two more
CALL, END = SIZE, SIZE + 1
TEXT = "the cat<|call|>"


@pytest.fixture
def path(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    OWN.hf.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def make(path):
    """A server with adapter `own`, whose directory holds a tokenizer with two tokens more."""

    def make(answer=(CALL, 5, END, 6), tokenizer=BASE, **config):
        client = FakeEngineClient(
            vocab_size=SIZE, context_length=8192, eos_token_ids=(1,), answer=lambda submit: list(answer)
        )
        client.tokens[str(path)] = SIZE + 2
        s = LocalServer(client, tokenizer, max_logprobs=SIZE + 99, **config)
        run(s.load_from("own", str(path)))
        return s

    return make


def ids(s):
    return [message.input_ids for message in s.client.submitted]


def test_native(make):
    s = make()
    both = {"text": [TEXT, TEXT], "lora_path": ["own", None], "sampling_params": {"max_new_tokens": 3}}
    own, base = s.post("/generate", both).json()
    assert ids(s) == [OWN.encode(TEXT), BASE.encode(TEXT)] and CALL in ids(s)[0]
    assert (own["text"], own["output_ids"]) == (f"<|call|>{BASE.token_text(5)}", [CALL, 5, END])
    assert own["meta_info"]["finish_reason"] == {"type": "stop", "matched": END}
    assert (base["text"], base["output_ids"]) == (BASE.token_text(5), [CALL, 5, END])
    assert base["meta_info"]["finish_reason"] == {"type": "length", "length": 3}


def test_the_end_is_ignored_with_ignore_eos_and_shown_when_asked_for(make):
    s = make()
    for params, text in (({"ignore_eos": True}, "<|call|>{}{}"), ({"no_stop_trim": True}, "<|call|>{}<|end|>")):
        params |= {"max_new_tokens": 4, "skip_special_tokens": False}
        expected = text.format(BASE.token_text(5), f"<|end|>{BASE.token_text(6)}")
        answer = s.post("/generate", {"text": "x", "lora_path": "own", "sampling_params": params}).json()
        assert answer["text"] == expected


def test_stop_strings(make):
    s = make()
    body = {"text": "x", "lora_path": "own", "sampling_params": {"stop": "call|", "max_new_tokens": 4}}
    answer = s.post("/generate", body).json()
    assert (answer["text"], answer["meta_info"]["finish_reason"]["matched"]) == ("<|", "call|")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(make, stream):
    s = make()
    native = {
        "text": [TEXT, "x"],
        "lora_path": ["own", None],
        "return_logprob": True,
        "return_text_in_logprobs": True,
        "sampling_params": {"max_new_tokens": 1},
    }
    own, base = s.post("/generate", native).json()
    assert own["meta_info"]["output_token_logprobs"] == [[-0.5, CALL, "<|call|>"]]
    assert base["meta_info"]["output_token_logprobs"] == [[-0.5, CALL, ""]]
    body = {"model": "own", "prompt": TEXT, "logprobs": 1, "echo": True, "max_tokens": 1, "stream": stream}
    answer = s.post("/v1/completions", body)
    choices = [f["choices"][0] for f in answer.frames] if stream else answer.json()["choices"]
    assert "".join(c["text"] for c in choices) == f"{TEXT}<|call|>"
    assert [t for c in choices if c["logprobs"] for t in c["logprobs"]["tokens"]][-2:] == ["<|call|>"] * 2


def test_tokenize_and_detokenize(make):
    s = make()
    for model, tokenizer in (("own", OWN), ("base:own", OWN), (None, BASE)):
        tokens = s.post("/tokenize", {"prompt": TEXT, "model": model}).json()["tokens"]
        assert tokens == tokenizer.encode(TEXT)
        assert s.post("/detokenize", {"tokens": tokens, "model": model}).json()["text"] == TEXT
    assert s.post("/detokenize", {"tokens": [CALL], "model": "own"}).json()["text"] == "<|call|>"
    assert s.post("/detokenize", {"tokens": [CALL]}).error["param"] == "tokens"


def test_echo_of_ids(make):
    s = make()
    body = {"model": "own", "prompt": OWN.encode(TEXT), "echo": True, "max_tokens": 1}
    assert s.post("/v1/completions", body).json()["choices"][0]["text"] == f"{TEXT}<|call|>"


def test_chat_with_the_base_models_template(make):
    s = make()
    messages = [{"role": "user", "content": TEXT}]
    body = {"model": "own", "messages": messages, "logprobs": True, "max_tokens": 3}
    spec = s.post("/v1/chat/completions", body).json()["choices"][0]
    assert ids(s) == [OWN.encode_chat(messages)] and CALL in ids(s)[0]
    assert OWN.hf.chat_template == BASE.hf.chat_template
    assert spec["message"]["content"] == f"<|call|>{BASE.token_text(5)}"
    assert [token["token"] for token in spec["logprobs"]["content"]][::2] == ["<|call|>", "<|end|>"]
    assert spec["finish_reason"] == "stop"


LIMITS = [
    ({"input_ids": [END]}, {"input_ids": [END + 1]}, "input_ids"),
    (
        {"input_ids": [5], "sampling_params": {"stop_token_ids": [END]}},
        {"input_ids": [5], "sampling_params": {"stop_token_ids": [END + 1]}},
        "stop_token_ids",
    ),
    (
        {"input_ids": [5], "sampling_params": {"logit_bias": {str(END): 1}}},
        {"input_ids": [5], "sampling_params": {"logit_bias": {str(END + 1): 1}}},
        "logit_bias",
    ),
    (
        {"input_ids": [5], "return_logprob": True, "top_logprobs_num": SIZE + 2},
        {"input_ids": [5], "return_logprob": True, "top_logprobs_num": SIZE + 3},
        "top_logprobs_num",
    ),
]


@pytest.mark.parametrize(("good", "bad", "field"), LIMITS, ids=[field for _, _, field in LIMITS])
def test_limits_are_the_adapters(bare, good, bad, field):
    bare.load("plain")
    for name in ("own", "bare"):
        assert bare.post("/generate", good | {"lora_path": name}).status == 200
        answer = bare.post("/generate", bad | {"lora_path": name})
        assert (answer.status, answer.error["param"]) == (400, field)
    for name in (None, "plain"):
        assert bare.post("/generate", good | {"lora_path": name}).error["param"] == field


@pytest.fixture
def bare(make, tmp_path):
    """The server, with adapter `bare` too, whose directory holds no tokenizer."""
    directory = tmp_path / "bare"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    s = make()
    s.client.tokens[str(directory)] = SIZE + 2
    run(s.load_from("bare", str(directory)))
    return s


def test_no_text_without_a_tokenizer(bare):
    says = "another vocabulary than the base model and came without a tokenizer: send input_ids, or save"
    chat = {"model": "bare", "messages": [{"role": "user", "content": "x"}]}
    for route, body, param in (
        ("/generate", {"text": "x", "lora_path": "bare"}, "text"),
        ("/v1/completions", {"model": "bare", "prompt": "x"}, "prompt"),
        ("/v1/chat/completions", chat, "messages"),
    ):
        answer = bare.post(route, body)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert says in answer.error["message"]
    assert bare.client.submitted == []
    answer = bare.post("/generate", {"input_ids": [CALL], "lora_path": "bare"}).json()
    assert (answer["text"], answer["output_ids"]) == (BASE.decode([5, 6]), [CALL, 5, END, 6])


@pytest.mark.parametrize("name", ["own", "bare"])
def test_no_grammar(bare, name):
    params = {"json_schema": '{"type": "object"}'}
    answer = bare.post("/generate", {"input_ids": [5], "lora_path": name, "sampling_params": params})
    assert (answer.status, answer.error["param"]) == (400, "json_schema")
    assert "an adapter with tokens of its own" in answer.error["message"]
    assert bare.post("/generate", {"input_ids": [5], "sampling_params": params}).status == 200


@pytest.mark.parametrize("route", ["/load_lora_adapter", "/v1/load_lora_adapter"])
def test_a_tokenizer_that_cannot_be_loaded_fails_the_load(make, path, route):
    s = make()
    loaded = dict(s.client.loaded)
    (path / "tokenizer.json").write_text("{")
    answer = s.post(route, {"lora_name": "other", "lora_path": str(path)})
    message = answer.json()["error_message"] if route == "/load_lora_adapter" else answer.error["message"]
    assert answer.status == 400 and "the tokenizer of the adapter cannot be loaded" in message
    assert (s.client.loaded, s.registry.loaded()) == (loaded, {"own": str(path)})
    again = s.post("/v1/load_lora_adapter", {"lora_name": "own", "lora_path": str(path), "load_inplace": True})
    assert again.status == 400
    s.post("/generate", {"text": TEXT, "lora_path": "own"})
    assert ids(s) == [OWN.encode(TEXT)]  # the old version is still what it was


def test_a_reload_brings_the_new_tokens(make, path):
    s = make()
    new = with_added_tokens(BASE, "<|tool|>", "cat<|call|>")
    new.hf.save_pretrained(path)
    swap = {"lora_name": "own", "lora_path": str(path), "load_inplace": True}
    assert s.post("/v1/load_lora_adapter", swap).status == 200
    s.post("/generate", {"text": TEXT, "lora_path": "own"})
    assert ids(s) == [new.encode(TEXT)] != [OWN.encode(TEXT)]
    s.post("/unload_lora_adapter", {"lora_name": "own"})
    run(s.load_from("own", "/adapters/plain"))
    s.post("/generate", {"text": TEXT, "lora_path": "own"})
    assert ids(s)[-1] == BASE.encode(TEXT)


def test_a_reload_while_a_prompt_is_tokenized(make, path, monkeypatch):
    """The request keeps the version that it began with: its tokens, its weights, its end."""
    s = make()
    text = TEXT * 200  # long enough for a thread
    tokenizing, go_on = threading.Event(), threading.Event()

    def slow_encode(tokenizer, text, encode=Tokenizer.encode, **options):
        tokenizing.set()
        assert go_on.wait(SECONDS)
        return encode(tokenizer, text, **options)

    async def scenario():
        monkeypatch.setattr(Tokenizer, "encode", slow_encode)
        call = s.connect("POST", "/generate", {"text": text, "lora_path": "own"})
        assert await asyncio.to_thread(tokenizing.wait, SECONDS)
        swap = {"lora_name": "own", "lora_path": "/adapters/plain", "load_inplace": True}
        assert (await s.send("POST", "/v1/load_lora_adapter", swap)).status == 200
        assert s.client.unloaded == []
        go_on.set()
        assert (await call.answer()).json()["output_ids"] == [CALL, 5, END]
        while s.client.unloaded != [1]:
            await asyncio.sleep(0)

    run(scenario())
    monkeypatch.undo()
    assert ids(s) == [OWN.encode(text)]
    assert s.client.submitted[0].adapters == ((1, 1.0),)


def test_outside_the_roots(make, path, tmp_path):
    s = make(lora_root=[str(path)])
    outside = tmp_path.parent / f"{tmp_path.name} outside"
    outside.mkdir()
    (path / "tokenizer.json").rename(outside / "tokenizer.json")
    (path / "tokenizer.json").symlink_to(outside / "tokenizer.json")
    answer = s.post("/load_lora_adapter", {"lora_name": "other", "lora_path": str(path)})
    assert answer.status == 400 and "outside every --lora-root" in answer.json()["error_message"]


def test_server_info(make):
    s = make()
    s.load("plain")
    found = s.get("/server_info").json()["loaded_adapters"]
    assert {a["lora_name"]: a["vocab_size"] for a in found} == {"own": SIZE + 2, "plain": SIZE}


def test_at_start(make, path):
    s = make()
    run(s.load_many([LoraPath("first", str(path)), LoraPath("second", "/adapters/plain")]))
    s.post("/generate", {"text": TEXT, "lora_path": "first"})
    assert ids(s) == [OWN.encode(TEXT)]


def test_without_tokenizers(make):
    s = make(tokenizer=None)
    answer = s.post("/generate", {"input_ids": [CALL], "lora_path": "own"}).json()
    assert (answer["text"], answer["output_ids"]) == ("", [CALL, 5, END, 6])
    assert "--skip-tokenizer-init" in s.post("/generate", {"text": "x", "lora_path": "own"}).error["message"]
