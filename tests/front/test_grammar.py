"""Grammars as they are checked, compiled, kept by the front and given to the engine.

Covers `grammars/compiler.py`, `grammars/source.py` too.
"""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import xgrammar
from fakes.models import FakeEngineClient
from fakes.tokenizers import byte_level_tokenizer, metaspace_tokenizer

from multilora.errors import BadRequest
from multilora.front import grammar
from multilora.front.effects import CompiledText
from multilora.front.grammar import Grammars
from multilora.front.grammars import compiler as compiling
from multilora.front.grammars.compiler import GrammarCompiler, Setup
from multilora.front.grammars.source import ANY_JSON, MAX_SOURCE, check_source
from multilora.front.vocabulary import Vocabulary
from multilora.params import SamplingParams

EOS = 1
SCHEMA = {"type": "object", "properties": {"cat": {"type": "integer"}}, "required": ["cat"]}


@pytest.fixture(scope="module", params=[byte_level_tokenizer, metaspace_tokenizer])
def compiler(request) -> GrammarCompiler:
    """As the process that compiles grammars makes it."""
    tokenizer = request.param()
    return Setup.decode(Setup(tokenizer, tokenizer.vocab_size + 7, [EOS]).encode())


def accepts(compiler: GrammarCompiler, text: str, field: str, source: str) -> bool:
    """As the engine does: from the two texts alone."""
    check_source(field, source)
    info = xgrammar.TokenizerInfo.deserialize_json(compiler.tokenizer_info)
    grammar = xgrammar.Grammar.deserialize_json(compiler.compile(field, source))
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(grammar))
    return matcher.accept_string(text) and matcher.accept_token(EOS)


@pytest.mark.parametrize(
    ("field", "source", "good", "bad"),
    [
        ("regex", r"\d{3}-[ab]+", "123-aab", "12-a"),
        ("ebnf", 'root ::= "cat " dog\ndog ::= "dog" | "the"', "cat the", "cat cat"),
        ("json_schema", json.dumps(SCHEMA), '{"cat": 12}', '{"dog": 12}'),
        ("json_schema", ANY_JSON, '[1, {"a": null}]', "[1,"),
        ("json_schema", '{"allOf": [{"type": "integer"}]}', "12", '"a"'),
    ],
)
def test_what_was_compiled_travels_as_text(compiler, field, source, good, bad):
    assert accepts(compiler, good, field, source)
    assert not accepts(compiler, bad, field, source)


def test_both_ways_of_making_a_compiler_give_the_same():
    for make in (byte_level_tokenizer, metaspace_tokenizer):
        setup = Setup(make(), 300)
        here = GrammarCompiler(setup.tokenizer.hf, setup.vocab_size, setup.stop_token_ids)
        assert Setup.decode(setup.encode()).tokenizer_info == here.tokenizer_info


@pytest.mark.parametrize(
    ("field", "source"),
    [
        ("regex", "(ab"),
        ("regex", r"[^\s\S]"),
        ("regex", r"a[^\s\S]+b"),
        ("ebnf", 'start ::= "a"'),
        ("ebnf", "root ::= b"),
        ("ebnf", 'root ::= root "a"'),
        ("ebnf", 'root ::= "a" root'),
        ("ebnf", 'root ::= "a" b{2,3}\nb ::= "b" b'),
        ("json_schema", "{"),
        ("json_schema", "3"),
        ("json_schema", "false"),
        ("json_schema", '{"enum": []}'),
        ("json_schema", '{"type": "nope"}'),
        ("json_schema", "[" * 100_000),
        ("json_schema", '{"items":' * 900 + "{}" + "}" * 900),
        ("json_schema", '{"items":' * 70 + "{}" + "}" * 70),
        ("json_schema", '{"anyOf": [{"allOf": [{"type": "object"}, {"required": ["a"]}]}]}'),
        ("json_schema", '{"properties": {"a": {"$ref": "http://example.org/a"}}}'),
        ("json_schema", '{"not": {"type": "string"}}'),
    ],
)
def test_bad_grammars(compiler, field, source):
    with pytest.raises(BadRequest, match=rf"sampling_params\.{field} is not a usable grammar") as e:
        accepts(compiler, "", field, source)
    assert e.value.param == field
    assert ".cc:" not in e.value.message


@pytest.mark.parametrize("source", ["a?b*", "", r"[^a]|x{0}", "(a|b)*"])
def test_what_can_be_met_is_not_called_empty(compiler, source):
    compiler.compile("regex", source)
    compiler.compile("ebnf", 'root ::= "a" root | "b"')


def test_sources_and_results_are_bounded(compiler, monkeypatch):
    with pytest.raises(BadRequest, match=f"at most {MAX_SOURCE} are compiled"):
        check_source("regex", "a" * (MAX_SOURCE + 1))
    monkeypatch.setattr(compiling, "MAX_COMPILED", 10)
    with pytest.raises(BadRequest, match=r"it is too large: \d+ bytes, at most 10 are served"):
        compiler.compile("regex", "abc")
    monkeypatch.setattr(compiling, "MAX_TEXT", 10)
    with pytest.raises(BadRequest, match="its rules are too many"):
        compiler.compile("regex", "abc")


# ---------------------------------------------------------------------- kept by the front


class Compiling:
    """A front's grammars, and the sources that had to be compiled, each to a text of `size` characters."""

    def __init__(self, size: int = 10):
        self.engine = FakeEngineClient()
        self.grammars = Grammars(Vocabulary(byte_level_tokenizer(), 300), self.engine)
        self.compiled: list[Any] = []
        self._size = size

    def __call__(self, *params: SamplingParams) -> Sequence[str | None]:
        steps, answer = self.grammars.compile(params), None
        try:
            while True:
                effect = steps.send(answer)
                self.compiled.append((effect.field, effect.source))
                answer = CompiledText(effect.source.ljust(self._size), "info")
        except StopIteration as stop:
            return stop.value


def test_each_grammar_is_compiled_once():
    compile = Compiling(0)
    assert compile(SamplingParams(), SamplingParams(regex="a"), SamplingParams(regex="a")) == [None, "a", "a"]
    assert compile.engine.tokenizer_info == "info"
    compile.engine.tokenizer_info = None
    assert compile(SamplingParams(regex="a"), SamplingParams(ebnf="a")) == ["a", "a"]
    assert compile.compiled == [("regex", "a"), ("ebnf", "a")]
    assert compile.engine.tokenizer_info is None


def test_no_grammar_needs_no_tokenizer():
    grammars = Grammars(Vocabulary(None, 300), FakeEngineClient())
    assert list(grammars.compile([SamplingParams()])) == []
    with pytest.raises(BadRequest, match="a grammar needs a tokenizer"):
        next(grammars.compile([SamplingParams(regex="a")]))


def test_the_cache_counts_characters_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(grammar, "CACHE_BYTES", 22)
    compile = Compiling()
    for source in ["x", "y", "x", "z", "x", "y"]:
        compile(SamplingParams(regex=source))
    assert [source for _, source in compile.compiled] == ["x", "y", "z", "y"]


def test_one_request_has_a_bounded_number_of_grammars():
    with pytest.raises(BadRequest, match="65 different grammars in one request; at most 64"):
        Compiling()(*(SamplingParams(regex=f"{i}") for i in range(65)))
