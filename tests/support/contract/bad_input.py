"""Bad input: a typed error that names field and value, nothing changed, nothing lost, and nobody held up."""

import time

from .table import Section
from .world import CHAT, COMPLETION, CONTEXT, IDS, TEXT, few

line = Section("bad-input", "Bad input")

SECONDS = 5.0
"""How long a refusal may take on a busy machine; each of these once took longer, or never ended."""


def refused_soon(server, path, body, *words):
    start = time.perf_counter()
    error = server.refused(path, body, *words)
    assert time.perf_counter() - start < SECONDS
    assert len(error["message"]) < 2000
    server.get("/health")
    return error


def sampling(**values):
    return {"text": TEXT, "sampling_params": few(**values)}


@line
def prompts_of_a_million_tokens(server):
    """A prompt of a million tokens, as ids or as text, is 400 `context_length_exceeded` with both lengths."""
    ids, text = [5] * 1_000_000, "word " * 1_000_000
    found = refused_soon(server, "/generate", {"input_ids": ids}, f"{CONTEXT} tokens", "1000001 tokens")
    assert (found["code"], found["param"]) == ("context_length_exceeded", "input_ids")
    found = refused_soon(server, "/v1/completions", COMPLETION | {"prompt": ids}, "1000001 tokens")
    assert (found["code"], found["param"]) == ("context_length_exceeded", "prompt")
    found = refused_soon(server, "/generate", {"text": text}, f"{CONTEXT} tokens")
    assert (found["code"], found["param"]) == ("context_length_exceeded", "text")
    chat = CHAT | {"messages": [{"role": "user", "content": text}]}
    found = refused_soon(server, "/v1/chat/completions", chat, f"{CONTEXT} tokens")
    assert (found["code"], found["param"]) == ("context_length_exceeded", "messages")
    found = refused_soon(server, "/v1/responses", {"input": text}, f"{CONTEXT} tokens")
    assert (found["code"], found["param"]) == ("context_length_exceeded", "input")


@line
def ten_thousand_samples(server):
    """`n` = 10,000 is 400 and named, with the value, on every route."""
    for path, body in (
        ("/generate", sampling(n=10_000)),
        ("/v1/completions", COMPLETION | {"n": 10_000}),
        ("/v1/chat/completions", CHAT | {"n": 10_000}),
    ):
        assert refused_soon(server, path, body, "n", "10000")["param"] == "n"


@line
def ten_thousand_stop_strings(server):
    """10,000 stop strings are 400 and named, with their number and the limit."""
    stop = [f"s{i}" for i in range(10_000)]
    assert (
        refused_soon(server, "/generate", sampling(stop=stop), "10000", "64", "--max-stop-strings")["param"] == "stop"
    )
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        assert refused_soon(server, path, body | {"stop": stop}, "10000")["param"] == "stop"


@line
def catastrophic_expressions(server):
    """A `stop_regex` that backtracks for ever elsewhere is matched in linear time; what cannot be is 400."""
    for expression in ("((a{1000}){1000}){1000}", "(a)\\1", "(?=a)b", "(" * 300 + "a" + ")" * 300):
        found = refused_soon(server, "/generate", sampling(stop_regex=expression), "stop_regex", expression[:3])
        assert found["param"] == "stop_regex"
    start = time.perf_counter()
    found = server.native({"stop_regex": "(a+)+$|(a|aa)+b", "logit_bias": {"39": 0}})
    assert found["output_ids"]
    assert time.perf_counter() - start < SECONDS


@line
def endless_grammars(server):
    """A grammar that no text can follow, or that never ends, is 400 and named."""
    for field, grammar in (("ebnf", 'root ::= "a" root'), ("regex", r"[^\s\S]")):
        assert server.refused("/generate", sampling(**{field: grammar}), field)["param"] == field


@line
def not_a_number(server):
    """NaN and infinities in JSON are 400 with the field's name; so is a number that only becomes infinite."""
    for value in ("NaN", "Infinity", "-Infinity", "1e400"):
        for path, body in (
            ("/generate", '{"text": "a", "sampling_params": {"temperature": %s}}'),
            ("/v1/completions", '{"prompt": "a", "temperature": %s}'),
            ("/v1/chat/completions", '{"messages": [], "logit_bias": {"5": %s}}'),
            ("/load_lora_adapter", '{"lora_name": "a", "lora_path": [{"name": "pirate", "weight": %s}]}'),
        ):
            content = (body % value).encode()
            answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (path, value)
            assert f" = {value}" in answer.text, (path, answer.text)


@line
def wrong_types(server):
    """A value of another type is 400, with the field and what was expected."""
    for path, body, field in (
        ("/generate", sampling(temperature="hot"), "temperature"),
        ("/generate", sampling(stop={"a": 1}), "stop"),
        ("/generate", {"input_ids": ["5"]}, "input_ids"),
        ("/v1/completions", COMPLETION | {"max_tokens": "many"}, "max_tokens"),
        ("/v1/chat/completions", CHAT | {"messages": "Hi"}, "messages"),
    ):
        assert field in refused_soon(server, path, body, field)["param"]


@line
def the_clients_names(server):
    """An error names the field that the client has sent, on the OpenAI routes too."""
    for path, body, field, value in (
        ("/v1/completions", COMPLETION, "max_tokens", -1),
        ("/v1/completions", COMPLETION, "min_tokens", -1),
        ("/v1/completions", COMPLETION, "seed", 1 << 70),
        ("/v1/chat/completions", CHAT | {"max_tokens": None}, "max_completion_tokens", -1),
        ("/v1/chat/completions", CHAT, "top_p", -1.0),
        ("/v1/responses", {"input": "Hi"}, "max_output_tokens", -1),
    ):
        error = server.refused(path, body | {field: value}, f"{field} = {value}")
        assert error["param"] == field
        assert "sampling_params" not in error["message"]
    tokens = {"token_ids": IDS, "sampling_params": {"max_tokens": -1}}
    server.refused("/inference/v1/generate", tokens, "sampling_params.max_tokens = -1")


@line
def nothing_changes(server):
    """After a refusal the same server answers as before."""
    before = server.native(input_ids=IDS)["output_ids"]
    server.refused("/generate", sampling(n=10_000), "n")
    assert server.native(input_ids=IDS)["output_ids"] == before


line.elsewhere(
    "any-number",
    "Every number in every field is honoured as it is, or 400 with the field's name.",
    "tests/server/test_hostile_numbers.py::test_every_number_is_honoured_or_refused_by_name",
)
line.elsewhere(
    "any-body",
    "No JSON body, however odd, ends in a 500.",
    "tests/server/test_fuzz.py::test_no_body_is_our_mistake",
)
line.elsewhere(
    "bodies-too-large",
    "A body over the limit is 413, and reading stops there.",
    "tests/server/test_request_body.py::test_reading_stops_where_it_is_too_long",
)
line.elsewhere(
    "silent-connections",
    "A connection that sends nothing is closed, and one too many is told.",
    "tests/server/test_connections.py::test_a_silent_connection_is_closed",
)
