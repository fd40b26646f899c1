"""Answers that follow a grammar, asked for in each client's words, of the bundled model."""

import json
import re
from typing import Any

import pytest
from doors import HttpDoor
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer

from multilora.demo import base_model_path
from multilora.errors import BadRequest
from multilora.params import SamplingParams
from multilora.server.constraints import choice_grammar
from multilora.server.openai_bodies import CompletionBody

SCHEMA = {
    "type": "object",
    "properties": {"cat": {"enum": ["red", "blue"]}},
    "required": ["cat"],
    "additionalProperties": False,
}
TAG = {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}
FORMAT = {"type": "triggered_tags", "triggers": ["<f"], "tags": [TAG], "at_least_one": True, "stop_after_first": True}
OLD_TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
    "at_least_one": True,
}
CHOICES = ['say "yes"', "no\\", "ja\n", "perhaps é😀"]


def is_cat(text: str) -> bool:
    return json.loads(text) in ({"cat": "red"}, {"cat": "blue"})


def is_object(text: str) -> bool:
    """Or the beginning of one: nothing tells the model to come to an end."""
    return re.match(r'\s*\{\s*["}]', text) is not None


def has_tag(text: str) -> bool:
    found = re.fullmatch(r"(?s).*?<f>(.*?)</f>.*", text)
    return found is not None and is_cat(found[1])


ASKED = [
    ({"structured_outputs": {"json": SCHEMA}}, is_cat),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, is_cat),
    ({"structured_outputs": {"regex": "a[bc]{3}"}}, re.compile("a[bc]{3}").fullmatch),
    ({"structured_outputs": {"choice": CHOICES}}, CHOICES.__contains__),
    ({"structured_outputs": {"grammar": 'root ::= "cat" | "dog"'}}, ("cat", "dog").__contains__),
    ({"structured_outputs": {"json_object": True}, "max_tokens": 30}, is_object),
    ({"structured_outputs": {"structural_tag": {"format": FORMAT}}}, has_tag),
    ({"structured_outputs": {"structural_tag": json.dumps(OLD_TAG)}}, has_tag),
    ({"structured_outputs": {"regex": "x", "json": None, "json_object": False, "choice": None}}, "x".__eq__),
    ({"guided_json": SCHEMA}, is_cat),
    ({"guided_regex": "a[bc]{3}"}, re.compile("a[bc]{3}").fullmatch),
    ({"guided_choice": CHOICES}, CHOICES.__contains__),
    ({"guided_grammar": 'root ::= "cat" | "dog"'}, ("cat", "dog").__contains__),
    ({"response_format": {"type": "json_object"}, "max_tokens": 30}, is_object),
    ({"response_format": {"type": "structural_tag", "format": FORMAT}}, has_tag),
    ({"response_format": OLD_TAG}, has_tag),
    ({"regex": "a[bc]{3}"}, re.compile("a[bc]{3}").fullmatch),
    ({"response_format": {"type": "text"}, "ebnf": 'root ::= "cat"'}, "cat".__eq__),
]


@pytest.fixture(scope="module")
def door():
    door = HttpDoor(base_model_path(), served_model_name="base", context_length=768)
    yield door
    door.close()


def text_of(door: HttpDoor, route: str, **fields: Any) -> str:
    common = {"max_tokens": 300, "temperature": 0.5, "seed": 5}
    if route == "/v1/completions":
        answer = door.post(route, {"prompt": "Answer: "} | common | fields).json()
        return str(answer["choices"][0]["text"])
    answer = door.post(route, {"messages": [{"role": "user", "content": "?"}]} | common | fields).json()
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("fields", "right"), ASKED, ids=[str(fields)[:60] for fields, _ in ASKED])
def test_the_answer_follows(door, route, fields, right):
    text = text_of(door, route, **fields)
    assert right(text), text


@pytest.mark.parametrize("tag", [{"type": "structural_tag", "format": FORMAT}, OLD_TAG])
def test_sglangs_own_parameter(door, tag):
    params = {"max_new_tokens": 600, "temperature": 0.5, "sampling_seed": 1, "structural_tag": json.dumps(tag)}
    assert has_tag(door.post("/generate", {"text": "Answer: ", "sampling_params": params}).json()["text"])


JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("fields", "first", "second"),
    [
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.regex", "structured_outputs."),
        ({"structured_outputs": {"regex": "a"}, "regex": "b"}, "structured_outputs", "regex"),
        ({"response_format": JSON_FORMAT, "guided_json": {}}, "response_format", "guided_json"),
        ({"response_format": JSON_FORMAT, "json_schema": "{}"}, "response_format", "json_schema"),
        ({"response_format": JSON_FORMAT, "structured_outputs": {"regex": "a"}}, "response_format", "structured_"),
        ({"guided_choice": ["a"], "ebnf": 'root ::= "a"'}, "guided_choice", "ebnf"),
    ],
)  # fmt: skip
def test_two_grammars_are_refused_by_both_names(door, fields, first, second):
    with pytest.raises(BadRequest, match=f"only one grammar, but {re.escape(first)}.* and {re.escape(second)}"):
        text_of(door, "/v1/completions", **fields)


def test_two_parameters_are_refused_by_both_names():
    with pytest.raises(BadRequest, match="only one grammar, but regex and structural_tag are both given") as caught:
        SamplingParams.parse({"structural_tag": "{}", "regex": "a"})
    assert caught.value.param == "structural_tag"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured_outputs": {}}, "structured_outputs: one of json, regex, choice, grammar, json_object, st"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs: one of"),
        ({"structured_outputs": "json"}, "structured_outputs"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json is not a usable grammar"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex is not a usable grammar"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: must be a list of texts that are"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 3]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar is not a usable grammar"),
        ({"structured_outputs": {"structural_tag": "[]"}}, "structural_tag is not a usable grammar: a struct"),
        ({"structured_outputs": {"structural_tag": {"format": {"type": "odd"}}}}, "structural_tag is not a"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs.disable_any_"),
        ({"structured_outputs": {"regex": "a", "backend": "outlines"}}, "structured_outputs.backend: not supported"),
        ({"guided_choice": []}, "guided_choice: must be"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend: not supported"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: this field is required"),
        ({"response_format": {"type": "structural_tag"}}, "exactly one of format and structures"),
        ({"response_format": {"type": "structural_tag", "structures": [3], "triggers": ["<"]}}, 'each of "struct'),
        ({"response_format": {"type": "structural_tag", "structures": []}}, '"structures" and "triggers" are arrays'),
        ({"response_format": {"type": "structural_tag", "format": []}}, "response_format.format"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_bad_input(door, route, fields, message):
    with pytest.raises(BadRequest, match=re.escape(message)):
        text_of(door, route, **fields)


def test_options_at_their_defaults_are_ignored():
    given = {"regex": "a", "disable_any_whitespace": False, "whitespace_pattern": None}
    body = CompletionBody.model_validate({"prompt": "x", "structured_outputs": given})
    assert body.constraint() == ("structured_outputs.regex", "regex", "a")


def test_the_schema_of_anything_is_a_schema():
    for fields in ({"structured_outputs": {"json": {}}}, {"guided_json": {}}):
        _, parameter, source = CompletionBody.model_validate({"prompt": "x"} | fields).constraint()
        assert (parameter, source) == ("json_schema", "{}")


def test_a_lone_surrogate_is_refused_and_no_crash():
    server = LocalServer(FakeEngineClient(vocab_size=320, eos_token_ids=(1,)), byte_level_tokenizer())
    answer = server.post("/v1/completions", b'{"prompt": "x", "guided_choice": ["\\ud800"]}')
    assert (answer.status, server.client.submitted) == (400, [])


def test_texts_become_an_ebnf_grammar():
    assert choice_grammar(['a"b', "é"], "choice") == 'root ::= "a\\"b" | "é"'
