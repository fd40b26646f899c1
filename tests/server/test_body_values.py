"""How many values a body may have, and what becomes of long lists of token ids."""

import json
from array import array

import pytest

from multilora.errors import BadRequest
from multilora.server import body_values
from multilora.server.bodies import GenerateBody, LoadAdapterBody
from multilora.server.body_values import check_values, pack_ids
from multilora.server.openai_bodies import CompletionBody


@pytest.mark.parametrize(
    "body",
    [b"[" + b"[1]," * 200_000 + b"1]", b'{"a":[' + b"{}," * 150_000 + b"1]}", b"[" + b"1," * 2_500_000 + b"1]"],
)
def test_too_many_values(body):
    with pytest.raises(BadRequest, match="the body has over"):
        check_values(body)


def test_what_is_in_texts_does_not_count():
    check_values(json.dumps({"text": '[{,"\\' * 1_000_000, "more": ["a,[b"] * 1000}).encode())


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 1000])
def test_pieces_are_counted_as_the_whole_is(monkeypatch, at_once):
    """Whatever stands where one ends: an escape, a text, a quote in one."""
    monkeypatch.setattr(body_values, "_SORTED_AT_ONCE", at_once)
    values = ["a", '"', "\\", '\\"', '[,{"', "\\\\", ""]
    for number in range(200):
        chosen = [values[(number * 7**i >> 2) % len(values)] for i in range(number % 9)]
        body = json.dumps({"a": chosen, "b": {}}).encode()
        assert b"".join(body_values._pieces(body)) == body
        for limit, real in (("MAX_CONTAINERS", 3), ("MAX_TEXTS", len(chosen) + 2), ("MAX_VALUES", body.count(b", "))):
            with monkeypatch.context() as limits:
                for name in ("MAX_CONTAINERS", "MAX_TEXTS", "MAX_VALUES"):
                    limits.setattr(body_values, name, 1 << 20)
                limits.setattr(body_values, limit, real)
                check_values(body)
                limits.setattr(body_values, limit, real - 1)
                with pytest.raises(BadRequest, match="the body has over"):
                    check_values(body)


def test_texts_are_counted_without_quotes_in_them():
    check_values(json.dumps(["a"] * 400_000 + ['"' * 2_000_000]).encode())
    with pytest.raises(BadRequest, match="500000 texts"):
        check_values(json.dumps({"a": dict.fromkeys(map(str, range(500_001)), 1)}).encode())


def test_a_body_of_quotes_is_not_taken_apart():
    with pytest.raises(BadRequest, match="texts"):
        check_values(b"[" + b'"",' * 2_500_000 + b'""]')


def _packed(kind, **fields):
    value = body_values.body_values(json.dumps(fields).encode(), kind)
    pack_ids(value)
    return value


def test_long_lists_of_token_ids_are_packed():
    ids = list(range(1000))
    assert _packed(GenerateBody, input_ids=ids).input_ids == array("q", ids)
    assert _packed(GenerateBody, input_ids=[5, 6]).input_ids == [5, 6]
    assert _packed(CompletionBody, model="a", prompt=[ids, [1]]).prompt == [array("q", ids), [1]]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (GenerateBody, {"text": ["a"] * 1000}),
        (GenerateBody, {"text": "a", "return_logprob": [True] * 1000}),
        (GenerateBody, {"input_ids": [2**63] * 1000}),
        (GenerateBody, {}),
        (CompletionBody, {"model": "a", "prompt": "b" * 1000}),
        (CompletionBody, {"model": "a", "prompt": []}),
        (CompletionBody, {"model": "a", "prompt": [1], "stop_token_ids": [7] * 1000}),
        (LoadAdapterBody, {"lora_name": "a", "lora_path": "b"}),
    ],
)
def test_everything_else_stays(kind, fields):
    assert _packed(kind, **fields) == body_values.body_values(json.dumps(fields).encode(), kind)
