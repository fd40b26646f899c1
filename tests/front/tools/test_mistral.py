import re

import pytest
from answers import PLACES, TOOLS, answer_of, answers, check_contract, counter, read
from hypothesis import given

from multilora.front.tools.base import CallStarted
from multilora.front.tools.mistral import MistralCalls

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL = ("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"[TOOL_CALLS][{PARIS}]", "", [CALL]),
        (f"[TOOL_CALLS] [{PARIS}, {PARIS}]", "", [CALL, CALL]),
        (f"[TOOL_CALLS] [{PARIS}]\n\nDone", "\n\nDone", [CALL]),
        (f"[TOOL_CALLS] {PARIS}", "", [CALL]),
        (f"I look. [TOOL_CALLS] [{PARIS}", "I look.", [CALL]),
        (f'[TOOL_CALLS] [{PARIS}, {{"name": ', ', {"name": ', [CALL]),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [CALL]),
        ('[TOOL_CALLS]get_weather{"city": "Paris"}', "", [CALL]),
        ('[TOOL_CALLS] get_weather [ARGS] {"city": "Paris"}', "", [CALL]),
        (
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}',
            "",
            [CALL, ("get_time", "{}")],
        ),
        (
            'Look: [TOOL_CALLS]search[ARGS]{"query": "[TOOL_CALLS]["} ok',
            "Look: ok",
            [("search", '{"query": "[TOOL_CALLS]["}')],
        ),
        ('[TOOL_CALLS]ns.search-2[ARGS]{"a": [1]}', "", [("ns.search-2", '{"a": [1]}')]),
    ],
)
def test_answers(text, content, calls):
    assert answer_of(MistralCalls, text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[TOOL_CALLS",
        "[TOOL_CALLS]",
        "[TOOL_CALLS] []",
        "[TOOL_CALLS] I will call it.",
        "[TOOL_CALLS]get_weather",
        "[TOOL_CALLS]get_weather[ARGS]",
        "[TOOL_CALLS]get_weather[ARGS][1]",
        "[TOOL_CALLS]get_weather[CALL_ID][ARGS]{",
        "[TOOL_CALLS]get_weather[OTHER]{}",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Par',
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": Paris}}]',
    ],
)
def test_what_is_no_call_is_content(text):
    assert answer_of(MistralCalls, text) == (text, [])


def test_the_model_s_own_id_is_kept():
    text = "[TOOL_CALLS]get_time[CALL_ID]a1B2c3D4e[ARGS]{}"
    assert CallStarted(0, "a1B2c3D4e", "get_time") in read(MistralCalls(TOOLS, counter()), [text])


def test_other_ids_are_what_mistral_s_templates_accept():
    started = [
        e for e in read(MistralCalls(TOOLS), [f"[TOOL_CALLS][{PARIS}, {PARIS}]"]) if isinstance(e, CallStarted)
    ]
    assert len({e.id for e in started}) == 2
    assert all(re.fullmatch("[A-Za-z0-9]{9}", e.id) for e in started)


@given(
    answers("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "abc", PARIS, '{"city": 1}', "get_time", "[", "]", ",", "[TOOL"),
    PLACES,
)
def test_any_text_in_any_pieces(text, places):
    check_contract(MistralCalls, text, places)
