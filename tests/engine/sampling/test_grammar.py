import json
import random

import pytest
import torch
import xgrammar

from multilora.engine.sampling.grammar import GrammarCache, GrammarState
from multilora.errors import BadRequest

EOS, EOT, VOCAB = 257, 258, 300
TOKENS = [bytes([i]) for i in range(256)] + [b"<s>", b"</s>", b"<eot>", b"true", b'{"', b'":', b"12"]
INFO = xgrammar.TokenizerInfo(TOKENS, vocab_type=xgrammar.VocabType.RAW, vocab_size=290, stop_token_ids=[EOS])
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


def compiled(regex: str) -> str:
    return xgrammar.GrammarCompiler(INFO).compile_regex(regex).serialize_json()


@pytest.fixture
def cache() -> GrammarCache:
    return GrammarCache(INFO.serialize_json(), VOCAB)


def start(cache: GrammarCache, grammar: str, stops=(EOS,), ends=(), min_new_tokens=0) -> GrammarState:
    return GrammarState(cache.read(grammar), stops, ends, min_new_tokens)


def bits(mask: torch.Tensor) -> set[int]:
    """The tokens that a line of masks allows."""
    return {32 * word + bit for word, value in enumerate(mask.tolist()) for bit in range(32) if value >> bit & 1}


def allowed(cache: GrammarCache, state: GrammarState, position=0) -> set[int]:
    return bits(cache.masks([state], [position], pinned=False)[0])


def feed(state: GrammarState, text: bytes) -> None:
    assert all(state.accept(byte) for byte in text)


@pytest.mark.parametrize("seed", range(5))
def test_random_choices_make_valid_json(cache, seed):
    grammar = xgrammar.GrammarCompiler(INFO).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    state = start(cache, grammar.serialize_json())
    rng, text = random.Random(seed), b""
    while not state.is_terminated:
        token = rng.choice(sorted(allowed(cache, state)))
        assert state.accept(token)
        text += TOKENS[token] if token != EOS else b""
    answer = json.loads(text)
    assert set(answer) == {"ok", "n"}
    assert isinstance(answer["ok"], bool)
    assert 0 <= answer["n"] <= 99


def test_what_the_grammar_forbids_is_not_accepted_and_changes_nothing(cache):
    state = start(cache, compiled("ab+"))
    assert not state.accept(ord("b"))
    assert not state.accept(EOS)
    assert allowed(cache, state) == {ord("a")}
    feed(state, b"ab")
    assert allowed(cache, state) == {ord("b"), EOS}


def test_only_stop_tokens_follow_the_end(cache):
    state = start(cache, compiled("ab"), [EOS, EOT])
    feed(state, b"ab")
    assert not state.is_terminated
    assert allowed(cache, state) == {EOS, EOT}
    assert state.accept(EOT)
    assert state.is_terminated
    assert allowed(cache, state) == {EOS, EOT}
    assert not state.accept(ord("a"))
    assert state.accept(EOS)


def test_ends_are_taken_out_below_the_minimum_unless_nothing_else_is_left(cache):
    state = start(cache, compiled("ab*"), ends=[EOS, 31, 299], min_new_tokens=3)
    feed(state, b"a")
    assert allowed(cache, state, 2) == {ord("b")}
    assert allowed(cache, state, 3) == {ord("b"), EOS}
    state = start(cache, compiled("a"), ends=[EOS], min_new_tokens=3)
    feed(state, b"a")
    assert allowed(cache, state, 1) == {EOS}


def test_without_stop_tokens_the_tokenizer_names_them(cache):
    state = start(cache, compiled("a"), [])
    feed(state, b"a")
    assert allowed(cache, state) == {EOS}


def test_lines_of_one_call_are_independent(cache):
    states = [start(cache, compiled(x)) for x in ("[a-c]", "x", "y*")]
    feed(states[1], b"x")
    assert states[1].accept(EOS)  # has ended
    masks = cache.masks(states, [0, 2, 0], pinned=False)
    assert [bits(mask) for mask in masks] == [{97, 98, 99}, {EOS}, {ord("y"), EOS}]


def test_cache_reads_once_and_forgets_the_least_recently_used():
    cache = GrammarCache(INFO.serialize_json(), VOCAB, capacity=2)
    a, b, c = (compiled(x) for x in "abc")
    for grammar in (a, b, a, c):
        cache.read(grammar)
    assert len(cache) == 2
    reads: list[str] = []
    read = cache._deserialize
    cache._deserialize = lambda grammar: reads.append(grammar) or read(grammar)  # type: ignore[method-assign]
    for grammar in (a, c, b):
        cache.read(grammar)
    assert reads == [b]


def test_two_requests_of_one_grammar_are_independent(cache):
    grammar = compiled("abc")
    one, two = start(cache, grammar), start(cache, grammar)
    feed(one, b"ab")
    assert allowed(cache, two) == {ord("a")}


def test_broken_or_foreign_grammars_are_refused(cache):
    other = xgrammar.TokenizerInfo(TOKENS, vocab_size=280, stop_token_ids=[EOS])
    foreign = xgrammar.GrammarCompiler(other).compile_regex("a").serialize_json()
    for grammar in ("no json", "{}", foreign):
        with pytest.raises(BadRequest, match="the grammar cannot be used"):
            cache.read(grammar)
    assert len(cache) == 0


def test_a_vocabulary_larger_than_the_models_is_refused():
    with pytest.raises(ValueError, match="290 > the model's 289"):
        GrammarCache(INFO.serialize_json(), 289)
