"""The process that reads large bodies: what it answers is what a thread here would, and it may end at any time."""

import json
import os
import signal
from array import array

import psutil
import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer
from waiting import wait_for

from multilora.errors import BadRequest, MultiloraError, PromptTooLong, QueueFull
from multilora.front.prompt import encode, read_prompts
from multilora.server import body_process
from multilora.server.bodies import GenerateBody, LoadAdapterBody, LoadBody
from multilora.server.body_process import BodyProcess
from multilora.server.body_values import body_values, pack_ids
from multilora.server.openai_bodies import ChatBody, CompletionBody
from multilora.server.pooling.bodies import ClassifyBody, EmbeddingsBody
from multilora.server.token_generate import TokenGenerateBody
from multilora.server.tokenization import TokenizeBody

CHAT = {"model": "a", "messages": [{"role": "user", "content": "a"}]}


def nested(depth: int) -> list:
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


CASES = [
    (GenerateBody, {"input_ids": list(range(40_000)), "sampling_params": {"stop": ["a"] * 1000}}),
    (GenerateBody, {"input_ids": [[5] * 1000, [7]], "rid": ["a", "b"]}),
    (GenerateBody, {"text": "ä𝄞\u0000" * 30_000}),
    (GenerateBody, {"text": ["a", 1] * 50_000}),
    (GenerateBody, {"input_ids": [True] * 50_000}),
    (GenerateBody, {"input_ids": [2**70] * 300}),
    (ChatBody, CHAT | {"user": "x" * 100_000}),
    (ChatBody, CHAT | {"messages": [1] * 50_000}),
    (ChatBody, CHAT | {"temperature": "hot"}),
    (CompletionBody, {"model": "a", "prompt": [[1, 2]] * 20_000}),
    (CompletionBody, {"prompt": []}),
    (EmbeddingsBody, {"model": "a", "input": ["a b"] * 20_000}),
    (ClassifyBody, {"text": "a", "input": [3] * 1000}),
    (TokenGenerateBody, {"token_ids": [3] * 1000, "sampling_params": {"temperature": 0}}),
    (TokenGenerateBody, {"token_ids": []}),
    (TokenizeBody, {"prompt": "a" * 100_000}),
    (LoadAdapterBody, {"lora_name": "a", "lora_path": "/b", "pinned": True}),
    (LoadAdapterBody, [1, 2]),
    (GenerateBody, {"text": "a", "lora_path": nested(900)}),
    (ChatBody, CHAT | {"tools": [nested(900)]}),
]
RAW = [b'{"text": NaN}', b"[" * 100_000, b'{"a": ' + b"[1]," * 200_000, b'{"text": "\xff"}', b""]


@pytest.fixture(scope="module")
def process():
    found = BodyProcess()
    found.start()
    wait_for(found.is_ready)
    yield found
    found.close()


def _outcome(read):
    try:
        return read()
    except BadRequest as e:
        return e.kind, e.message, e.param


def _here(body, kind):
    value = body_values(body, kind)
    pack_ids(value)
    return value


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_it_answers_what_a_thread_would(process, kind, fields):
    body = json.dumps(fields).encode()
    found = _outcome(lambda: process.read(body, kind))
    assert found == _outcome(lambda: _here(body, kind))
    if isinstance(found, GenerateBody):
        assert found.model_fields_set == _here(body, kind).model_fields_set


def test_what_goes_wrong_there_ends_one_request(process):
    """`LoadBody` is no route's."""
    with pytest.raises(MultiloraError, match="internal error: AttributeError"):
        process.read(b"{}", LoadBody)
    assert process.read(b'{"text": "a"}', GenerateBody).text == "a"


@pytest.mark.parametrize("body", RAW)
def test_what_is_no_json_is_said_in_the_same_words(process, body):
    found = _outcome(lambda: process.read(body, GenerateBody))
    assert found == _outcome(lambda: _here(body, GenerateBody))
    assert found[0] == "BadRequest"


def test_it_leaves_the_server_the_cores_and_the_signals(process):
    (pid,) = [one.pid for one in psutil.Process().children() if body_process.__name__ in one.cmdline()]
    assert os.getpriority(os.PRIO_PROCESS, pid) >= 5
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert process.read(b'{"text": "a"}', GenerateBody).text == "a"


def _its_process(of):
    before = {one.pid for one in psutil.Process().children()}
    of.start()
    (found,) = [one for one in psutil.Process().children() if one.pid not in before]
    return found


def test_none_is_started_unasked():
    process = BodyProcess()
    assert not process.is_ready()
    with pytest.raises(QueueFull):
        process.read(b"{}", GenerateBody)
    assert process._socket is None


@pytest.mark.slow
def test_one_that_is_killed_is_missed_once_and_started_again(monkeypatch, caplog):
    process = BodyProcess()
    child = _its_process(process)
    wait_for(process.is_ready)
    child.kill()
    child.wait()
    with pytest.raises(QueueFull, match="has ended; try again"):
        process.read(b'{"text": "a"}', GenerateBody)
    assert "the process that reads large bodies has ended" in caplog.text
    assert not process.is_ready()  # and none is started again at once
    monkeypatch.setattr(body_process, "RESTART_SECONDS", 0.0)
    wait_for(process.is_ready)
    assert process.read(b'{"text": "a"}', GenerateBody).text == "a"
    process.close()


@pytest.mark.slow
def test_one_that_hangs_is_killed(monkeypatch):
    process = BodyProcess()
    child = _its_process(process)
    monkeypatch.setattr(body_process, "ANSWER_SECONDS", 0.2)
    wait_for(process.is_ready)
    child.suspend()
    with pytest.raises(QueueFull):
        process.read(b'{"text": "a"}', GenerateBody)
    assert not child.is_running()


@pytest.mark.slow
def test_it_logs_as_the_server_does(capfd):
    process = BodyProcess(("info", "json"))
    process.start()
    wait_for(process.is_ready)
    process.read(b'{"model": "a", "messages": [{"role": "user", "content": "a"}], "user": "b"}', ChatBody)
    with pytest.raises(MultiloraError):
        process.read(b"{}", LoadBody)
    process.close()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "could not be read" in line]
    assert len(lines) == 1
    assert "AttributeError" in json.dumps(lines[0])


def test_it_ends_with_its_socket():
    process = BodyProcess()
    child = _its_process(process)
    wait_for(process.is_ready)
    process._socket.shutdown(2)
    assert child.wait(60) == 0


@pytest.mark.parametrize("executable", ["/bin/false", "/nowhere"])
def test_where_it_does_not_start_that_is_said_and_bodies_are_read_here(monkeypatch, caplog, executable):
    tokenizer = byte_level_tokenizer()
    server = LocalServer(FakeEngineClient(vocab_size=tokenizer.vocab_size), tokenizer)
    monkeypatch.setattr(body_process.sys, "executable", executable)
    server.app.state.bodies.process.start()
    large = CHAT | {"model": "base", "user": "x" * 100_000, "max_tokens": 1}
    assert server.post("/v1/chat/completions", large).status == 200
    process = server.app.state.bodies.process
    wait_for(lambda: not process.is_ready() and "does not start" in caplog.text)
    assert server.post("/v1/chat/completions", large).status == 200


@pytest.mark.parametrize("where", ["thread", "process"])
def test_prompts_of_many_ids_are_served_and_refused_alike(where):
    tokenizer = byte_level_tokenizer()
    server = LocalServer(FakeEngineClient(vocab_size=tokenizer.vocab_size, context_length=50_000), tokenizer)
    if where == "process":
        server.app.state.bodies.process.start()
        wait_for(server.app.state.bodies.process.is_ready)
    ids = [5 + i % 60 for i in range(40_000)]
    sampling = {"max_new_tokens": 1}
    answer = server.post("/generate", {"input_ids": ids, "sampling_params": sampling})
    assert answer.status == 200
    assert answer.json()["meta_info"]["prompt_tokens"] == 40_000
    answer = server.post("/generate", {"input_ids": [ids, ids[:1]], "sampling_params": sampling})
    assert [one["meta_info"]["prompt_tokens"] for one in answer.json()] == [40_000, 1]
    answer = server.post("/v1/completions", {"model": "base", "prompt": ids, "max_tokens": 1, "echo": True})
    assert answer.json()["choices"][0]["text"].startswith(tokenizer.decode(ids))
    answer = server.post("/inference/v1/generate", {"token_ids": ids, "sampling_params": {"max_tokens": 1}})
    assert answer.status == 200
    long = "This model's maximum context length is 50000 tokens. However, you requested 50001 tokens (50000 in the"
    for path, body in (
        ("/generate", {"input_ids": [7] * 50_000}),
        ("/v1/completions", {"model": "base", "prompt": [7] * 50_000}),
        ("/inference/v1/generate", {"token_ids": [7] * 50_000}),
    ):
        answer = server.post(path, body)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert answer.error["message"].startswith(long)
    answer = server.post("/generate", {"input_ids": [*ids, 10**6], "sampling_params": sampling})
    assert answer.status == 400
    assert "token id 1000000 is outside the vocabulary" in answer.error["message"]
    answer = server.post("/generate", {"input_ids": [*ids, 2**70], "sampling_params": sampling})
    assert answer.status == 400


def test_an_array_of_another_type_is_no_prompt():
    with pytest.raises(BadRequest, match="a prompt is text or a list of token ids"):
        read_prompts([array("f", [1.0])], "input_ids")
    assert read_prompts(array("i", [1, 2]), "input_ids") == ([[1, 2]], False)
    assert read_prompts([array("I", [1, 2]), array("q", [3])], "input_ids") == ([[1, 2], array("q", [3])], True)


def test_padding_is_taken_from_an_array_before_its_length_counts():
    ids = array("q", [7] * 100)
    assert encode(ids, None, 50, "input_ids", answered=False, padded=True) == [7] * 100
    with pytest.raises(PromptTooLong):
        encode(ids, None, 50, "input_ids", answered=False)
