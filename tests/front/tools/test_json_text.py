import pytest

from multilora.front.tools import json_text


def test_values():
    assert json_text.load('{"a": [1, null]}') == {"a": [1, None]}
    assert json_text.load_object("{}") == {}
    assert json_text.dump({"a": "é"}) == '{"a": "é"}'


@pytest.mark.parametrize("text", ["NaN", '{"a": -Infinity}', "[" * 100_000, "", "{'a': 1}", "1" * 5000])
def test_texts_that_are_refused(text):
    with pytest.raises(ValueError):
        json_text.load(text)


@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "array"), ("null", "null"), ("true", "boolean"), ('"a"', "string")]
)
def test_no_object(text, kind):
    with pytest.raises(ValueError, match=f"a JSON {kind}, not an object"):
        json_text.load_object(text)


def test_values_that_are_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (float("nan"), [float("inf")], {"a": "\ud83d"}, deep):
        with pytest.raises(ValueError):
            json_text.dump(value)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "null"),
        (True, "boolean"),
        (1, "number"),
        (1.5, "number"),
        ("a", "string"),
        ([], "array"),
        ({}, "object"),
    ],
)
def test_type_names(value, name):
    assert json_text.type_name(value) == name
