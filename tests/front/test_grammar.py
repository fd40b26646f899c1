import json

import pytest
import xgrammar
from fakes.tokenizers import byte_level_tokenizer, metaspace_tokenizer

from multilora.errors import BadRequest
from multilora.front import grammar
from multilora.front.grammar import ANY_JSON, GrammarCompiler
from multilora.params import SamplingParams

EOS = 1
SCHEMA = {"type": "object", "properties": {"cat": {"type": "integer"}}, "required": ["cat"]}


@pytest.fixture(scope="module", params=[byte_level_tokenizer, metaspace_tokenizer])
def tokenizer(request):
    return request.param()


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size + 7, eos_token_ids=[EOS])


def accepts(compiler: GrammarCompiler, tokenizer, text: str, **params) -> bool:
    """As the engine does: from the two JSON texts alone."""
    info = xgrammar.TokenizerInfo.deserialize_json(compiler.tokenizer_info_json())
    compiled = xgrammar.CompiledGrammar.deserialize_json(compiler.compile(SamplingParams(**params)), info)
    matcher = xgrammar.GrammarMatcher(compiled)
    return matcher.accept_string(text) and matcher.accept_token(EOS)


@pytest.mark.parametrize(
    ("params", "good", "bad"),
    [
        ({"regex": r"\d{3}-[ab]+"}, "123-aab", "12-a"),
        ({"ebnf": 'root ::= "cat " dog\ndog ::= "dog" | "the"'}, "cat the", "cat cat"),
        ({"json_schema": json.dumps(SCHEMA)}, '{"cat": 12}', '{"dog": 12}'),
        ({"json_schema": ANY_JSON}, '[1, {"a": null}]', "[1,"),
    ],
)
def test_what_was_compiled_travels_as_text(compiler, tokenizer, params, good, bad):
    assert accepts(compiler, tokenizer, good, **params)
    assert not accepts(compiler, tokenizer, bad, **params)


def test_no_grammar(compiler):
    assert compiler.compile(SamplingParams()) is None


@pytest.mark.parametrize(
    ("field", "source"),
    [
        ("regex", "(ab"),
        ("ebnf", 'start ::= "a"'),
        ("ebnf", "root ::= b"),
        ("json_schema", "{"),
        ("json_schema", "3"),
        ("json_schema", '{"type": "nope"}'),
        ("json_schema", "[" * 100_000),
    ],
)
def test_bad_grammars(compiler, field, source):
    with pytest.raises(BadRequest, match=rf"sampling_params\.{field} is not a usable grammar") as e:
        compiler.compile(SamplingParams(**{field: source}))
    assert e.value.param == field
    assert ".cc:" not in e.value.message


def test_results_are_cached(compiler, monkeypatch):
    first = compiler.compile(SamplingParams(regex="a+b"))
    monkeypatch.setattr(compiler, "_compile", lambda field, source: f"compiled {source}")
    assert compiler.compile(SamplingParams(regex="a+b")) is first
    assert compiler.compile(SamplingParams(ebnf="a+b")) == "compiled a+b"


def test_the_cache_forgets_the_oldest(compiler, monkeypatch):
    calls = []
    monkeypatch.setattr(grammar, "_CACHE_ENTRIES", 2)
    monkeypatch.setattr(compiler, "_compile", lambda field, source: calls.append(source) or source)
    compiler._cache.clear()
    for source in ["x", "y", "x", "z", "x", "y"]:
        compiler.compile(SamplingParams(regex=source))
    assert calls == ["x", "y", "z", "y"]
    compiler._cache.clear()
