"""Foreign fields: each field of both peers passes at its default; what would change the answer is refused by name."""

import json
import logging
from pathlib import Path

import pytest

from multilora.errors import BadRequest
from multilora.server import foreign_fields
from multilora.server.bodies import GenerateBody
from multilora.server.foreign_fields import HARMLESS, NEUTRAL, LogOnce, ignorable, sort_out
from multilora.server.openai_bodies import ChatBody, CompletionBody

PEERS = json.loads((Path(__file__).parents[1] / "data" / "peer_fields.json").read_text())
BODIES = PEERS["bodies"]
ROUTES = {body["route"] for body in BODIES}
# Of OpenAI's documentation or of older clients; in no class of the peers'.
OPENAI_ONLY = {"function_call", "prediction", "verbosity", "include_obfuscation", "base_model_name"}
OPENAI_ONLY |= {"summary", "generate_summary"}
ANTHROPIC_ONLY = {"cache_control", "context_management", "diagnostics", "inference_geo", "speed"}
ANTHROPIC_ONLY |= {"budget_tokens", "display"}
OBJECTS = {"reasoning", "text.format", "thinking"}  # within bodies of these two
# True for a prompt and false for messages: the route has to know it.
MUST_BE_IMPLEMENTED = {("/tokenize", "add_special_tokens"), ("/update_weight_version", "abort_all_requests")}
FIELDS = [
    pytest.param(body["route"], name, facts, id=f"{body['peer']}-{body['route']}-{name}")
    for body in BODIES
    for name, facts in body["fields"].items()
    if not facts.get("required") and (body["route"], name) not in MUST_BE_IMPLEMENTED
]
COMPUTED = {"request_id": "cmpl-1", "req_type": 1, "output_kind": 0}  # made at run time, or an enumeration's number


def test_the_data_are_of_the_versions_that_are_promised():
    assert PEERS["peers"] == {"sglang": "0.5.23", "vllm": "0.33.0"}
    counts = {(b["peer"], b["class"]): len(b["fields"]) for b in BODIES}
    assert counts["sglang", "GenerateReqInput"] == 72
    assert counts["vllm", "ChatCompletionRequest"] > 60


@pytest.mark.parametrize(("route", "name", "facts"), FIELDS)
def test_every_field_of_the_peers_passes_at_its_default(route, name, facts):
    default = COMPUTED[name] if facts.get("computed") else facts["default"]
    sort_out({name: default, "ours": [1]}, {"ours"}, route)
    sort_out({name: None}, set(), route)


@pytest.mark.parametrize("body", BODIES, ids=lambda b: f"{b['peer']}-{b['route']}-{b['class']}")
def test_a_body_with_every_default_passes_at_once(body):
    route, facts = body["route"], body["fields"].items()
    implemented = {name for of, name in MUST_BE_IMPLEMENTED if of == route}
    sort_out({name: f["default"] for name, f in facts if "default" in f}, implemented, route)


def test_every_entry_of_the_tables_is_a_field_that_somebody_sends():
    known = {name for body in BODIES for name in body["fields"]} | OPENAI_ONLY | ANTHROPIC_ONLY
    for route in HARMLESS.keys() | NEUTRAL.keys():
        assert route in ROUTES | OBJECTS | {""}
        assert HARMLESS.get(route, frozenset()) <= known
        assert NEUTRAL.get(route, {}).keys() <= known


def test_no_field_is_in_both_tables():
    for route, names in HARMLESS.items():
        assert not names & (NEUTRAL[""].keys() | NEUTRAL.get(route, {}).keys())
    assert not any(HARMLESS[""] & fields.keys() for fields in NEUTRAL.values())


@pytest.mark.parametrize(
    ("route", "name", "value"),
    [
        ("/generate", "return_hidden_states", True),
        ("/generate", "image_data", ["https://host/cat.png"]),
        ("/generate", "custom_logit_processor", [None, "{}"]),
        ("/v1/chat/completions", "parallel_tool_calls", False),  # true is the default
        ("/v1/completions", "best_of", 3),
        ("/v1/completions", "suffix", "}"),
        ("/v1/completions", "length_penalty", 0.8),
        ("/v1/completions", "use_beam_search", True),
        ("/v1/responses", "conversation", "c"),
        ("/v1/responses", "truncation", "auto"),
        ("sampling_params", "top_k", 40),
        ("sampling_params", "temperature", True),  # true is not 1
        ("/load_lora_adapter_from_tensors", "expected_checksums", {"w": "00"}),
        ("/v1/chat/completions", "nobody_knows_this", 0),
        ("/v1/chat/completions", "nobody_knows_this", "x"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(route, name, value):
    with pytest.raises(BadRequest, match=f"^{name}: .*not supported") as caught:
        sort_out({name: value}, set(), route)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("route", "name", "value"),
    [
        ("/v1/chat/completions", "user", "somebody"),
        ("/v1/chat/completions", "metadata", {"a": "b"}),
        ("/v1/chat/completions", "service_tier", "flex"),
        ("/v1/chat/completions", "modalities", ["text"]),
        ("/generate", "data_parallel_rank", 1),
        ("/generate", "image_data", [None, None]),
        ("sampling_params", "top_k", 0),
        ("sampling_params", "n", 1.0),
        ("/v1/chat/completions", "nobody_knows_this", None),
        ("/v1/chat/completions", "nobody_knows_this", False),
        ("/v1/chat/completions", "nobody_knows_this", ""),
        ("/v1/chat/completions", "nobody_knows_this", {}),
        ("/v1/tokenize", "add_generation_prompt", True),
    ],
)
def test_what_asks_for_nothing_passes(route, name, value):
    sort_out({name: value}, set(), route)


def test_an_implemented_field_is_not_looked_at():
    sort_out({"suffix": "}", "top_k": 40}, {"suffix", "top_k"}, "/v1/completions")


def test_the_body_is_left_alone():
    body = {"user": "u", "model": None, "prompt": "a"}
    sort_out(body, {"prompt"}, "/v1/completions")
    assert body == {"user": "u", "model": None, "prompt": "a"}


def test_sglang_router_s_additions_pass():
    """What sglang-router writes into each /generate that it forwards."""
    added = {"model": None, "log_metrics": True, "return_entropy": False, "no_logs": False, "background": False}
    sort_out({"text": "a", **added}, {"text"}, "/generate")


def test_a_misspelt_name_is_answered_with_the_right_one():
    with pytest.raises(BadRequest, match="temprature: not supported by this server; did you mean 'temperature'"):
        sort_out({"temprature": 0.5}, {"temperature", "top_p"}, "/v1/completions")


def test_a_listed_field_is_refused_with_the_values_that_pass():
    with pytest.raises(BadRequest, match="best_of: 3 is not supported by this server, only 1 is: no answer is"):
        sort_out({"best_of": 3}, set(), "/v1/completions")


def test_each_name_is_logged_once(caplog):
    log = LogOnce()
    with caplog.at_level(logging.INFO, foreign_fields.__name__):
        for _ in range(3):
            sort_out({"user": "u", "odd": None, "prompt": "p"}, {"prompt"}, "/v1/completions", log=log)
    assert [record.args for record in caplog.records] == [("user", "/v1/completions"), ("odd", "/v1/completions")]


def test_neither_log_nor_memory_grow_with_names_that_clients_make_up(caplog):
    log = LogOnce(limit=5)
    with caplog.at_level(logging.INFO, foreign_fields.__name__):
        sort_out({f"made_up_{i}": None for i in range(100)}, set(), "/generate", log=log)
    assert len(caplog.records) == 5


def test_messages_are_bounded_and_printable():
    name = "x\n\ud800" + "y" * 10_000
    with pytest.raises(BadRequest) as caught:
        sort_out({name: [1] * 100_000}, {"text"}, "/generate")
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message
    caught.value.message.encode()
    with pytest.raises(BadRequest) as caught:
        sort_out({"tool_choice": ["z" * 10_000] * 1000}, set(), "/generate")
    assert len(caught.value.message) < 300


def test_no_field_that_is_served_today_hides_in_the_tables():
    """A field of a body's own is implemented: its entry would say that it has no effect."""
    for body in (GenerateBody, CompletionBody, ChatBody):
        assert not any(ignorable(name, "x", body.where) for name in body.model_fields if name != "rid")
