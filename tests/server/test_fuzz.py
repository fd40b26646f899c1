"""Whatever a client sends: never a 500, never an adapter held, and always an ending."""

import asyncio
import json

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multilora.params import SamplingParams
from multilora.server import bodies
from multilora.server import openai_bodies as openai_models
from multilora.server.anthropic.body import CountBody, MessagesBody
from multilora.server.foreign_fields import HARMLESS, NEUTRAL
from multilora.server.responses.body import ResponsesBody
from multilora.server.token_generate import TokenGenerateBody, TokenSampling
from multilora.server.tokenization import DetokenizeBody, TokenizeBody

TOKENIZER = byte_level_tokenizer()

TEXT = st.sampled_from(["", "hi", "a", "base", "base:a", "nope", "[", '{"type": "object"}']) | st.text(max_size=8)
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 12)
    | st.floats(allow_nan=False)
    | TEXT
    | st.just(10**400)
)
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=6
)
SAMPLING_NAMES = sorted({*SamplingParams.__struct_fields__, *TokenSampling.model_fields})
SAMPLING = st.dictionaries(st.sampled_from(SAMPLING_NAMES), JSON, max_size=3)
KINDS = ["text", "message", "function_call", "function_call_output", "reasoning", "item_reference", "function"]
KINDS += ["tool_use", "tool_result", "thinking", "tool", "any", "custom"]
KEYS = ["role", "content", "call_id", "id", "name", "arguments", "output", "input", "input_schema", "parameters"]
ITEM = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4).flatmap(
    lambda fields: st.sampled_from(KINDS).map(lambda kind: fields | {"type": kind})
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": TEXT | st.lists(ITEM, max_size=2)}
)
MESSAGES = st.just([{"role": "user", "content": "hi"}]) | st.lists(MESSAGE, max_size=3)

LIKELY = {
    "text": st.sampled_from(["hi", ["hi", "ho"]]),
    "prompt": st.sampled_from(["hi", ["hi", "ho"], [5, 6], [[5], [6]]]),
    "input_ids": st.sampled_from([[5, 6], [[5], [6]]]),
    "token_ids": st.sampled_from([[5, 6], [5.0]]),
    "tokens": st.sampled_from([[5, 6], [[5], [6]]]),
    "model": st.sampled_from(["base", "a", "base:a"]),
    "messages": MESSAGES,
    "sampling_params": SAMPLING | st.lists(SAMPLING, max_size=2),
    "lora_path": st.sampled_from(["a", ["a", None], [{"name": "a", "weight": 0.5}], [[{"name": "a"}], "a"], None]),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "json_schema"}]),
    "max_tokens": st.integers(0, 9),
    "n": st.integers(1, 3),
    "input": st.just("hi") | st.lists(ITEM, max_size=3),
    "system": TEXT | st.lists(ITEM, max_size=2),
    "tools": st.lists(ITEM, max_size=2),
    "tool_choice": ITEM,
}
ROUTES = {
    "/generate": (bodies.GenerateBody, ("text",)),
    "/v1/completions": (openai_models.CompletionBody, ("model", "prompt")),
    "/v1/chat/completions": (openai_models.ChatBody, ("model", "messages")),
    "/v1/responses": (ResponsesBody, ("input",)),
    "/v1/messages": (MessagesBody, ("max_tokens", "messages")),
    "/v1/messages/count_tokens": (CountBody, ("messages",)),
    "/inference/v1/generate": (TokenGenerateBody, ("token_ids",)),
    "/tokenize": (TokenizeBody, ()),
    "/detokenize": (DetokenizeBody, ("tokens",)),
    "/load_lora_adapter": (bodies.LoadAdapterBody, ("lora_name", "lora_path")),
    "/unload_lora_adapter": (bodies.UnloadAdapterBody, ("lora_name",)),
    "/v1/load_lora_adapter": (bodies.V1LoadAdapterBody, ("lora_name", "lora_path")),
    "/abort_request": (bodies.AbortBody, ()),
}


def bodies_of(model, required):
    """Mostly right: the required fields, and a few others with likely or unlikely values."""
    names = sorted({*model.model_fields, *HARMLESS[""], *NEUTRAL[""]})
    fields = {name: LIKELY.get(name, JSON) | JSON for name in names}
    some = st.sets(st.sampled_from(names), max_size=4)
    return some.flatmap(lambda extra: st.fixed_dictionaries({n: fields[n] for n in sorted({*required} | extra)}))


@pytest.mark.parametrize("route", ["/v1/messages", "/v1/chat/completions"])
def test_a_number_of_a_thousand_digits_asks_for_all_that_fits(route):
    client = FakeEngineClient(vocab_size=320, eos_token_ids=(1,), answer=lambda m: [5, 6, 7, 1])
    s = LocalServer(client, TOKENIZER)
    body = {"model": "base", "max_tokens": 10**1000, "messages": [{"role": "user", "content": "hi"}]}
    assert run(s.send("POST", route, body)).status == 200
    assert client._running == {}


@pytest.mark.parametrize("route", ROUTES)
def test_no_body_is_our_mistake(route):
    client = FakeEngineClient(vocab_size=320, eos_token_ids=(1,), answer=lambda m: [5, 6, 7, 1])
    s = LocalServer(client, TOKENIZER)

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(bodies_of(*ROUTES[route]))
    def check(body):
        if "a" not in s.registry.loaded():
            s.load("a")

        async def scenario():
            answer = await s.send("POST", route, body)
            for _ in range(30):  # what runs in the background ends, too
                await asyncio.sleep(0)
            return answer

        answer = run(scenario())
        assert answer.status in (200, 400, 404), answer.text
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: {")]
            frames = [json.loads(line) for line in lines]
            assert all("error" not in frame and frame.get("type") != "response.failed" for frame in frames)
        assert client._running == {}
        assert all(entry.num_requests == 0 for entry in s.registry.refs())

    check()
