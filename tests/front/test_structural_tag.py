import json

import pytest
import xgrammar

from multilora.front.structural_tag import json_only, xgrammar_tag

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OLD = {"structures": [{"begin": "<f>", "schema": OBJECT, "end": "</f>"}], "triggers": ["<f"]}
LETTERS = [chr(i) for i in range(32, 127)] + ["\n", "</s>"]
COMPILER = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(LETTERS, stop_token_ids=[96]))


def accepts(source: str, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(COMPILER.compile_structural_tag(xgrammar_tag(source)))
    return matcher.accept_string(text) and matcher.accept_token(96)


def test_the_older_form_means_what_sglang_means():
    assert accepts(json.dumps(OLD), 'so <f>{"a": 1}</f> and <f>{"a": 2}</f>.')
    assert accepts(json.dumps(OLD), "nothing at all")
    assert not accepts(json.dumps(OLD), "so <f>{}</f>")
    assert not accepts(json.dumps(OLD | {"at_least_one": True}), "nothing at all")
    anything = {"structures": [{"begin": "<f>", "end": "</f>"}], "triggers": ["<f"]}
    assert accepts(json.dumps(anything), "<f>[1, null]</f>")
    assert not accepts(json.dumps(anything), "<f>x</f>")


def test_the_newer_form_is_left_as_it_is():
    source = json.dumps({"type": "structural_tag", "format": {"type": "any_text"}}, indent=3)
    assert xgrammar_tag(source) == source


@pytest.mark.parametrize(
    "tag", [[], 3, None, {"structures": 3}, {"structures": []}, {"structures": [{"begin": "a"}], "triggers": []}]
)
def test_what_is_no_structural_tag(tag):
    with pytest.raises(ValueError, match="structur"):
        xgrammar_tag(json.dumps(tag))
    with pytest.raises(ValueError):
        xgrammar_tag("{")


def test_white_space_is_bounded_where_nothing_but_json_may_stand():
    source = json.dumps(json_only(OBJECT, 8))
    assert accepts(source, '{"a": 1}')
    assert accepts(source, '{\n    "a": 1\n}')
    assert accepts(source, "{" + 8 * " " + '"a": 1}')
    assert not accepts(source, "{" + 9 * " " + '"a": 1}')
    assert not accepts(source, 'x {"a": 1}')
