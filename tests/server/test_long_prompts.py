"""A prompt of a million characters holds up nobody: with the bundled model's own tokenizer, over a fake engine."""

import time

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run

from multilora.demo import base_model_path
from multilora.front.tokenizer import Tokenizer

TEXT = ("the cat and the dog, \u65e5\u672c then the end. def f(x): return x + 1\n" * 20_000)[:1_000_000]
PROMPTS = {
    "/generate": {"text": TEXT},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": TEXT}]},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(base_model_path()))


@pytest.mark.parametrize("route", ["/generate", pytest.param("/v1/chat/completions", marks=pytest.mark.slow)])
def test_others_go_on_while_it_is_tokenized(tokenizer: Tokenizer, route: str) -> None:
    word = tokenizer.encode("the")[-1]
    endless = {"model": "base", "prompt": [word], "stream": True, "max_tokens": 90_000}
    client = FakeEngineClient(vocab_size=1024, context_length=300_000, answer=lambda submit: [word] * 90_000)
    server = LocalServer(client, tokenizer)

    async def scenario() -> tuple[float, float, int]:
        stream = server.connect("POST", "/v1/completions", endless)
        await stream.frame()
        long = server.connect("POST", route, PROMPTS[route])
        begun = last = time.perf_counter()
        gap, frames = 0.0, 0
        while not long.task.done():
            assert (await server.send("GET", "/health")).status == 200
            assert (await stream.frame())["choices"][0]["text"]
            now = time.perf_counter()
            gap, frames, last = max(gap, now - last), frames + 1, now
        assert (await long.answer()).error["code"] == "context_length_exceeded"
        stream.hang_up()
        await stream.answer()
        return gap, last - begun, frames

    gap, seconds, frames = run(scenario())
    assert frames > 20
    assert gap < 0.7 * seconds, f"{gap:.3f} of {seconds:.3f} s without a sign of life"
