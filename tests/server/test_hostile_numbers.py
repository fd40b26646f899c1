"""Numbers that are none, that are too large or of another type, in every numeric field of every body.

Each is 400 with the field's name, or the engine is asked for just that number: never a 500, never something else. The
fields are read off /openapi.json, so that a new one needs its line here.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import Answer, LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

from multilora.engine.messages import Submit

NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e400", "-1E+400", "1" + "0" * 5000)
OTHER_TYPES = ("true", "false", '"1"', "{}", '[[""]]')
NUMBERS = ("-0.0", "16.0", "2.5", str(2**63), str(-(2**63) - 1), str(10**30), "1e30")
CONTEXT = 64

BODIES = {
    "/generate": '{"text": "a", %s}',
    "/v1/completions": '{"model": "base", "prompt": "a", %s}',
    "/v1/chat/completions": '{"model": "base", "messages": [{"role": "user", "content": "a"}], %s}',
    "/v1/responses": '{"model": "base", "input": "a", %s}',
    "/v1/messages": '{"model": "base", "messages": [{"role": "user", "content": "a"}], %s}',
    "/inference/v1/generate": '{"token_ids": [5], %s}',
    "/tokenize": '{"prompt": "a", %s}',
    "/detokenize": "{%s}",
}
PROMPTS = {"input_ids": '"text"', "prompt": '"prompt"', "token_ids": '"token_ids"'}
"""Fields that are the prompt: the body has no other."""
TEXTS = {*PROMPTS, "input"}
"""Fields in which a text is a prompt as well as token ids are."""
BESIDE = {"top_logprobs": '"logprobs": true', "best_of": '"n": 16'}
BESIDE |= dict.fromkeys(("logprob_start_len", "top_logprobs_num"), '"return_logprob": true')
"""What a field asks for beside it."""

NONE: frozenset[str] = frozenset()
ZERO = frozenset({"-0.0"})
INTEGER = ZERO | {"16.0"}
LARGE = {str(2**63), str(10**30), "1e30"}
LIMIT = INTEGER | LARGE  # as much as fits the context
HONOURED: dict[str, frozenset[str]] = {
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens"), LIMIT),
    **dict.fromkeys(("min_new_tokens", "min_tokens", "seed", "sampling_seed", "priority", "top_k"), INTEGER),
    **dict.fromkeys(("stop_token_ids", "input_ids", "prompt", "token_ids", "tokens"), INTEGER),
    **dict.fromkeys(("top_logprobs", "top_logprobs_num", "prompt_logprobs"), INTEGER),
    **dict.fromkeys(("temperature", "logit_bias"), INTEGER | {"2.5"}),
    **dict.fromkeys(("min_p", "frequency_penalty", "presence_penalty", "logprob_start_len"), ZERO),
    **dict.fromkeys(("top_p", "repetition_penalty"), NONE),
    **dict.fromkeys(("n", "best_of"), INTEGER - ZERO),
    "logprobs": INTEGER | {"true", "false"},
    "timeout": frozenset({"16.0", "2.5"}),
}
"""Of each field the values that are taken; every other is 400."""
EXCEPTIONS: dict[tuple[str, str], frozenset[str]] = {
    ("/v1/messages", "max_tokens"): LIMIT - ZERO,
    ("/v1/chat/completions", "min_tokens"): LIMIT,  # without a limit the answer may fill the context
    ("/inference/v1/generate", "min_tokens"): LIMIT,
}

SAMPLING = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "seed": "sampling_seed"}
SAMPLING |= {"max_output_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
OF_MESSAGE = {"logprobs": "top_logprobs_num", "top_logprobs": "top_logprobs_num"}
OF_MESSAGE |= {name: name for name in ("top_logprobs_num", "prompt_logprobs", "priority", "logprob_start_len")}


@pytest.fixture(scope="module")
def server() -> LocalServer:
    tokenizer = byte_level_tokenizer()
    client = FakeEngineClient(vocab_size=320, context_length=CONTEXT, eos_token_ids=(1,), answer=lambda _: [5, 6, 1])
    return LocalServer(client, tokenizer)


def shapes(schema: dict[str, Any]) -> Iterator[str]:
    """How a field holds numbers: "%s" alone, "[%s]" in a list, '{"5": %s}' in an object."""
    for kind in (schema, *schema.get("anyOf", ())):
        if kind.get("type") in ("integer", "number"):
            yield "%s"
        elif kind.get("type") == "array" and {*shapes(kind["items"])} & {"%s"}:
            yield "[%s]"
        elif isinstance(inner := kind.get("additionalProperties"), dict) and {*shapes(inner)}:
            yield '{"5": %s}'


def fields_of(server: LocalServer, route: str) -> list[tuple[str, str, str]]:
    """Every numeric field of the route: within what ("%s": the body itself), its name, its shape."""
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    document = server.get("/openapi.json").json()["paths"][route]["post"]["requestBody"]
    body = re.search(r"schemas/(\w+)", str(document)).group(1)  # type: ignore[union-attr]
    inner = {"/generate": "SamplingParams", "/inference/v1/generate": "TokenSampling"}.get(route)
    found = [("%s", name, shape) for name, field in schemas[body]["properties"].items() for shape in shapes(field)]
    if inner:
        beside = {name for _, name, _ in found}
        found += [
            ('"sampling_params": {%s}', name, shape)
            for name, field in schemas[inner]["properties"].items()
            for shape in shapes(field)
            if name not in beside
        ]
    return found


def other_routes(server: LocalServer) -> list[str]:
    """Those that take numbers and have no line above."""
    paths = server.get("/openapi.json").json()["paths"]
    with_body = [path for path, operations in paths.items() if "requestBody" in operations.get("post", {})]
    return [path for path in with_body if path not in BODIES and fields_of(server, path)]


def body_of(route: str, within: str, name: str, value: str) -> bytes:
    item = within % f'"{name}": {value}'
    if name in BESIDE and route != "/v1/responses":
        item += f", {BESIDE[name]}"
    if route == "/v1/messages" and name != "max_tokens":
        item += ', "max_tokens": 2'
    return (f"{{{item}}}" if name in PROMPTS else BODIES[route] % item).encode()


def field_at_fault(route: str, answer: Answer) -> Any:
    error = answer.error
    if route != "/v1/messages":
        return error["param"]
    return re.match(r"(?:the body is not valid JSON: )?(\w+)", error["message"]).group(1)  # type: ignore[union-attr]


@pytest.mark.parametrize("route", BODIES)
def test_every_number_is_honoured_or_refused_by_name(server: LocalServer, route: str) -> None:
    fields = fields_of(server, route)
    assert fields or route == "/tokenize"

    async def scenario() -> None:
        for within, name, shape in fields:
            honoured = EXCEPTIONS.get((route, name), HONOURED[name])
            for value in (*NO_NUMBERS, *OTHER_TYPES, *NUMBERS):
                server.client.submitted.clear()
                body = body_of(route, within, name, shape % value)
                answer = await server.send("POST", route, body)
                if route != "/v1/messages" and name in TEXTS and value in ('"1"', '[[""]]'):
                    assert answer.status in (200, 400), (body, answer.text)  # a prompt of another kind
                    continue
                wanted = 200 if value in honoured and not (value in OTHER_TYPES and shape != "%s") else 400
                assert answer.status == wanted, (body, answer.text)
                if wanted == 400:
                    assert field_at_fault(route, answer) == name, (body, answer.text)
                    assert name in answer.text
                    assert server.client.submitted == []
                elif value not in OTHER_TYPES and server.client.submitted:
                    expect(server.client.submitted, name, float(value))

    run(scenario())


def expect(submitted: list[Submit], name: str, value: float) -> None:
    """The engine is asked for this number. `top_k` 0 is all; a limit is one as far as the context goes."""
    first = submitted[0]
    room = CONTEXT - len(first.input_ids)
    checks: dict[str, Callable[[], Any]] = {
        "n": lambda: len(submitted),
        "best_of": lambda: len(submitted),
        "stop_token_ids": lambda: (first.sampling.stop_token_ids or [None])[0],
        "logit_bias": lambda: (first.sampling.logit_bias or {})["5"],
        "timeout": lambda: value if first.deadline else None,
        **dict.fromkeys(("input_ids", "prompt", "token_ids"), lambda: first.input_ids[0]),
    }
    parameter = SAMPLING.get(name, name)
    if name in checks:
        found = checks[name]()
    elif name in OF_MESSAGE:
        found = getattr(first, OF_MESSAGE[name])
    else:
        found = getattr(first.sampling, parameter)
    if parameter in ("max_new_tokens", "min_new_tokens"):
        value = min(value, room)
    assert found == (-1 if (name, value) == ("top_k", 0) else value), (name, value, found)


def test_no_number_breaks_any_other_route(server: LocalServer) -> None:
    """An output_dir that is refused keeps the profiler from starting."""
    fields = {route: fields_of(server, route) for route in other_routes(server)}
    assert "/start_profile" in fields

    async def scenario() -> None:
        for route, numeric in fields.items():
            for _, name, shape in numeric:
                for value in (*NO_NUMBERS, *OTHER_TYPES, *NUMBERS):
                    rest = ', "output_dir": "/nope"' if route == "/start_profile" else ""
                    body = f'{{"{name}": {shape % value}{rest}}}'.encode()
                    answer = await server.send("POST", route, body)
                    taken = value in NUMBERS or (value == '"1"' and name in TEXTS)
                    assert 400 <= answer.status < 500 or (answer.status == 200 and taken), (route, body)
                    assert value not in NO_NUMBERS or answer.error["param"] == name

    run(scenario())


@pytest.mark.parametrize("value", ["NaN", "1e400", str(10**30), "2.5", "true", "-9"])
@pytest.mark.parametrize(
    ("method", "path", "name"),
    [("POST", "/sleep?level=%s", "level"), ("GET", "/v1/responses/%%s/input_items?limit=%s", "limit")],
)
def test_numbers_of_queries(server: LocalServer, method: str, path: str, name: str, value: str) -> None:
    if "%%s" in path:
        stored = server.post("/v1/responses", {"input": "a", "max_output_tokens": 2}).json()["id"]
        path = path.replace("%%s", stored)
    answer = run(server.send(method, path % value))
    assert (answer.status, answer.error["param"]) == (400, name)


@pytest.mark.parametrize("value", ["NaN", "1e400", str(2**63), str(10**30), "1e30", "true", '"1"', "[1]"])
def test_weights_of_compositions(server: LocalServer, value: str) -> None:
    if "a" not in server.registry.loaded():
        server.load("a")
    part = f'"lora_path": [{{"name": "a", "weight": {value}}}]'
    for route in ("/generate", "/v1/completions"):
        answer = server.post(route, (BODIES[route] % part).encode())
        assert (answer.status, answer.error["param"]) == (400, "lora_path")
        assert "weight" in answer.error["message"]


@pytest.mark.parametrize("key", ["5.0", "-1", "1e3", "NaN", " 5", "٥", "+5", "1_0", "", "9" * 5000])
def test_keys_of_biases(server: LocalServer, key: str) -> None:
    answer = server.post("/v1/completions", {"prompt": "a", "logit_bias": {key: 1}})
    assert (answer.status, answer.error["param"]) == (400, "logit_bias")


SCHEMA = '{"type": "object", "properties": {"a": {"type": "array", "items": {}, "minItems": %s}}, "required": ["a"]}'
TOOL = '"tools": [{"type": "function", "function": {"name": "f", "parameters": %s}}], "tool_choice": "required"'


@pytest.mark.parametrize("value", ["NaN", "2.5", str(2**63), '"1"'])
@pytest.mark.parametrize(
    ("route", "field", "item"),
    [
        ("/v1/completions", "guided_json", '"guided_json": %s'),
        ("/v1/completions", "structured_outputs", '"structured_outputs": {"json": %s}'),
        ("/v1/chat/completions", "tools", TOOL),
        (
            "/v1/chat/completions",
            "response_format",
            '"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": %s}}',
        ),
        ("/v1/responses", "text", '"text": {"format": {"type": "json_schema", "name": "a", "schema": %s}}'),
        ("/v1/messages", "output_config", '"output_config": {"format": {"type": "json_schema", "schema": %s}}'),
    ],
)
def test_numbers_of_schemas(server: LocalServer, route: str, field: str, item: str, value: str) -> None:
    """A grammar's error names the field that it came in."""
    item = item % (SCHEMA % value) + (', "max_tokens": 2' if route == "/v1/messages" else "")
    answer = server.post(route, (BODIES[route] % item).encode())
    assert answer.status == 400, answer.text
    assert field_at_fault(route, answer).partition(".")[0] == field, answer.text
