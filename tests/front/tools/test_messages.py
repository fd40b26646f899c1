import copy
import re

import pytest

from multilora.errors import BadRequest
from multilora.front.tools.messages import prepare_messages


def called(arguments, **fields) -> dict:
    function = {"name": "f"} | ({} if arguments is ... else {"arguments": arguments})
    return {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function, **fields}]}


@pytest.mark.parametrize(
    ("message", "prepared"),
    [
        ({"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "user", "content": ""}, {"role": "user", "content": ""}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]},
            {"role": "user", "content": "a\nb\nc"},
        ),
        ({"role": "developer", "content": "Be brief"}, {"role": "system", "content": "Be brief"}),
        ({"role": "user", "content": "Hi", "name": "Ann"}, {"role": "user", "content": "Hi", "name": "Ann"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        (
            # As the openai client dumps its own message object.
            {
                "role": "assistant",
                "content": "Hm",
                "refusal": None,
                "audio": None,
                "function_call": None,
                "tool_calls": None,
            },
            {"role": "assistant", "content": "Hm"},
        ),
        ({"role": "assistant", "content": "Hm", "tool_calls": []}, {"role": "assistant", "content": "Hm"}),
        ({"role": "user", "content": "Hm", "tool_calls": []}, {"role": "user", "content": "Hm"}),
        (
            {"role": "assistant", "content": "4", "reasoning": "2+2"},
            {"role": "assistant", "content": "4", "reasoning": "2+2", "reasoning_content": "2+2"},
        ),
        (
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "12 C"}]},
            {"role": "tool", "tool_call_id": "c1", "content": "12 C"},
        ),
        ({"role": "function", "name": "f", "content": "1"}, {"role": "function", "name": "f", "content": "1"}),
    ],
)
def test_messages(message, prepared):
    before = copy.deepcopy(message)
    assert prepare_messages([message]) == [prepared]
    assert message == before


@pytest.mark.parametrize(
    ("arguments", "decoded"),
    [
        ('{"city": "Paris", "n": [1, null]}', {"city": "Paris", "n": [1, None]}),
        (" {}\n", {}),
        ({"city": "Paris"}, {"city": "Paris"}),
        ("", {}),
        (None, {}),
        (..., {}),
    ],
)
def test_arguments_become_objects(arguments, decoded):
    message = called(arguments)
    before = copy.deepcopy(message)
    (prepared,) = prepare_messages([message])
    assert prepared["content"] == ""
    assert prepared["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": decoded}}
    ]
    assert message == before


def test_a_template_that_knows_developers():
    message = {"role": "developer", "content": "Be brief"}
    assert prepare_messages([message], knows_developer=True) == [message]


CALL = "messages[0].tool_calls[0]"


@pytest.mark.parametrize(
    ("message", "param", "shown"),
    [
        ("Hi", "messages[0]", "must be an object, not string"),
        ({"content": "Hi"}, "messages[0].role", "None: must be one of system"),
        ({"role": "asistant", "content": "Hi"}, "messages[0].role", "'asistant': must be one of"),
        ({"role": ["user"], "content": "Hi"}, "messages[0].role", "must be one of"),
        ({"role": "user"}, "messages[0].content", "a message of role 'user' needs content"),
        ({"role": "tool", "content": None}, "messages[0].content", "'tool' needs content"),
        ({"role": "user", "content": 3}, "messages[0].content", "not number"),
        ({"role": "user", "content": {}}, "messages[0].content", "not object"),
        ({"role": "user", "content": [3]}, "messages[0].content[0].type", "'number': only parts of type 'text'"),
        (
            {"role": "user", "content": ["a", {"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[1].type",
            "'image_url': only parts of type 'text'",
        ),
        ({"role": "user", "content": [{"text": "a"}]}, "messages[0].content[0].type", "None: only parts"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "not null"),
        ({"role": "tool", "content": "1", "tool_call_id": 3}, "messages[0].tool_call_id", "3: must be a string"),
        ({**called("{}"), "role": "user", "content": "a"}, "messages[0].tool_calls", "only assistant messages"),
        ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls", "must be an array, not object"),
        ({"role": "assistant", "tool_calls": [3]}, CALL, "must be an object, not number"),
        (called("{}", type="custom"), f"{CALL}.type", "'custom': only 'function'"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, f"{CALL}.function", "must be an object, not null"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, f"{CALL}.function.name", "None: must be"),
        (called("[1]"), f"{CALL}.function.arguments", "'[1]': must hold a JSON object: a JSON array"),
        (called("3"), f"{CALL}.function.arguments", "a JSON number"),
        (called("{city: 1}"), f"{CALL}.function.arguments", "must hold a JSON object: Expecting"),
        (called('{"a": NaN}'), f"{CALL}.function.arguments", "NaN is not JSON"),
        (called("[" * 100_000), f"{CALL}.function.arguments", "nested too deeply"),
        (called([1]), f"{CALL}.function.arguments", "not array"),
        (
            {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
            "messages[0].function_call",
            "tool_calls has taken its place",
        ),
    ],
)
def test_bad_messages(message, param, shown):
    with pytest.raises(BadRequest, match=re.escape(shown)) as e:
        prepare_messages([message])
    assert e.value.param == param
    assert len(e.value.message) < 300


def test_the_error_names_the_message():
    with pytest.raises(BadRequest) as e:
        prepare_messages([{"role": "user", "content": "a"}, {"role": "nobody", "content": "b"}])
    assert e.value.param == "messages[1].role"
