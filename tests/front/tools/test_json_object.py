import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from multilora.front.tools.json_object import MAX_DEPTH, CallObject, JsonObject

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def feed(text: str) -> tuple[str, dict[str, str], bool] | None:
    """(text as strict JSON, members, done), or None if a character was refused or came after the end."""
    obj, out, members = JsonObject(), [], {}
    for ch in text:
        written = None if obj.done else obj.feed(ch)
        if written is None:
            return None
        out.append(written)
        if obj.closed:
            members[obj.closed[0]] = obj.closed[1].rstrip()
    return "".join(out), members, obj.done


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.sampled_from([None, 1]), st.booleans())
def test_json_is_read(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    written, members, done = feed(text)
    assert done
    assert written == text
    assert {key: json.loads(item) for key, item in members.items()} == value


def refuse(constant: str):
    raise ValueError(constant)


@given(st.lists(st.sampled_from([*'{}[]:,"\\ \n', "1", "-", "0", ".5", "e+", "true", "nul", "u00e9", "a", "NaN"])))
@example(list('{"a":-}'))
@example(list('{"a":1.}'))
@example(list('{"a":"\\x"}'))
def test_what_json_takes_is_taken_and_nothing_else(parts):
    text = "{" + "".join(parts)
    read = feed(text)
    try:
        json.loads(text, strict=False, parse_constant=refuse, object_pairs_hook=unlike_keys)
    except ValueError:
        assert read is None or not read[2]
    else:
        assert read is not None or text.rstrip() != text  # white space after the end is not the object's
        assert read is None or read[2]


def unlike_keys(pairs):
    return pairs


def test_a_key_twice():
    assert feed('{"a": {"b": 1, "b": 2}}') is not None
    assert feed('{"a": 1, "a": 2}') is None
    assert feed('{"a": 1, "\\u0061": 2}') is None


def test_control_characters_are_escaped():
    written, members, done = feed('{"a\tb": "c\nd\x00"}')
    assert done
    assert json.loads(written) == {"a\tb": "c\nd\x00"}
    assert members == {"a\tb": '"c\\nd\\u0000"'}


def test_depth():
    def nested(depth: int) -> str:
        return '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"

    assert feed(nested(MAX_DEPTH)) is not None
    assert feed(nested(MAX_DEPTH + 1)) is None


def test_a_run_inside_a_string():
    obj = JsonObject()
    assert [obj.feed(ch) for ch in '{"a": "'] == list('{"a": "')
    assert obj.in_string
    assert obj.feed("many characters") == "many characters"
    assert not obj.in_string or obj.feed('"') == '"'
    assert obj.closed == ("a", '"many characters"')
    assert not obj.in_string


@pytest.mark.parametrize(
    ("text", "known", "result"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', None, ("f", '{"a": 1}')),
        ('{"name": "f"}', None, ("f", "{}")),
        ('{"name": "f"}', {"f"}, None),
        ('{"name": "f", "x": 1, "arguments": {}}', None, ("f", "{}")),
        ('{"name": "f", "x": 1, "arguments": {}}', {"f"}, None),
        ('{"name": "f", "arguments": null}', {"f"}, ("f", "{}")),
        ('{"type": "function", "id": 1, "name": "f", "parameters": {}}', {"f"}, ("f", "{}")),
        ('{"name": "g", "parameters": {}}', {"f"}, None),
        ('{"arguments": {}}', None, None),
    ],
)
def test_calls(text, known, result):
    call, arguments = CallObject(None if known is None else frozenset(known)), ""
    accepted = True
    for ch in text:
        accepted = accepted and call.feed(ch)
        arguments += call.take()
    assert (call.name, arguments) == result if accepted else result is None
    assert call.done is accepted
