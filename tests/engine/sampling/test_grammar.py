"""Covers `sampling/background.py`."""

import json
import random
import threading
import time

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


def text_of(regex: str) -> str:
    return xgrammar.Grammar.from_regex(regex).serialize_json()


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
    grammar = xgrammar.Grammar.from_json_schema(json.dumps(SCHEMA), any_whitespace=False)
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
    state = start(cache, text_of("ab+"))
    assert not state.accept(ord("b"))
    assert not state.accept(EOS)
    assert allowed(cache, state) == {ord("a")}
    feed(state, b"ab")
    assert allowed(cache, state) == {ord("b"), EOS}


def test_only_stop_tokens_follow_the_end(cache):
    state = start(cache, text_of("ab"), [EOS, EOT])
    feed(state, b"ab")
    assert not state.is_terminated
    assert allowed(cache, state) == {EOS, EOT}
    assert state.accept(EOT)
    assert state.is_terminated
    assert allowed(cache, state) == {EOS, EOT}
    assert not state.accept(ord("a"))
    assert state.accept(EOS)


def test_ends_are_taken_out_below_the_minimum_unless_nothing_else_is_left(cache):
    state = start(cache, text_of("ab*"), ends=[EOS, 31, 299], min_new_tokens=3)
    feed(state, b"a")
    assert allowed(cache, state, 2) == {ord("b")}
    assert allowed(cache, state, 3) == {ord("b"), EOS}
    state = start(cache, text_of("a"), ends=[EOS], min_new_tokens=3)
    feed(state, b"a")
    assert allowed(cache, state, 1) == {EOS}


def test_without_stop_tokens_the_tokenizer_names_them(cache):
    state = start(cache, text_of("a"), [])
    feed(state, b"a")
    assert allowed(cache, state) == {EOS}


def test_lines_of_one_call_are_independent(cache):
    states = [start(cache, text_of(x)) for x in ("[a-c]", "x", "y*")]
    feed(states[1], b"x")
    assert states[1].accept(EOS)  # has ended
    masks = cache.masks(states, [0, 2, 0], pinned=False)
    assert [bits(mask) for mask in masks] == [{97, 98, 99}, {EOS}, {ord("y"), EOS}]


def test_cache_compiles_once_and_forgets_the_least_recently_used():
    a, b, c = (text_of(x) for x in "abc")
    sizes = GrammarCache(INFO.serialize_json(), VOCAB)
    size = max(len(grammar) + sizes.read(grammar).memory_size_bytes for grammar in (a, b, c))
    cache = GrammarCache(INFO.serialize_json(), VOCAB, capacity=2 * size)
    for grammar in (a, b, a, c):
        cache.read(grammar)
    assert len(cache) == 2
    compiled: list[str] = []
    compile = cache._compile
    cache._compile = lambda grammar: compiled.append(grammar) or compile(grammar)  # type: ignore[method-assign]
    for grammar in (a, c, b):
        cache.read(grammar)
    assert compiled == [b]


def test_one_grammar_larger_than_the_cache_is_kept_until_the_next(cache):
    cache = GrammarCache(INFO.serialize_json(), VOCAB, capacity=1)
    cache.read(text_of("a"))
    cache.read(text_of("b"))
    assert len(cache) == 1


def test_compiling_in_the_background(cache):
    going_on, held = threading.Event(), cache._compile
    cache._compile = lambda grammar: going_on.wait(30) and held(grammar)  # type: ignore[method-assign]
    grammar = text_of("ab")
    assert not cache.ready(grammar)
    assert not cache.ready(grammar)
    going_on.set()
    while not cache.ready(grammar):
        time.sleep(0.001)
    feed(start(cache, grammar), b"ab")
    assert cache.ready(grammar)
    while not cache.ready("no json"):
        time.sleep(0.001)
    with pytest.raises(BadRequest, match="the grammar cannot be used"):
        cache.read("no json")


def test_two_requests_of_one_grammar_are_independent(cache):
    grammar = text_of("abc")
    one, two = start(cache, grammar), start(cache, grammar)
    feed(one, b"ab")
    assert allowed(cache, two) == {ord("a")}


def test_broken_grammars_are_refused(cache):
    for grammar in ("no json", "{}"):
        with pytest.raises(BadRequest, match="the grammar cannot be used"):
            cache.read(grammar)
    assert len(cache) == 0


def test_a_vocabulary_larger_than_the_models_is_refused():
    with pytest.raises(ValueError, match="290 > the model's 289"):
        GrammarCache(INFO.serialize_json(), 289)
