import json
import random

import pytest
import torch
import xgrammar

from multilora.engine.sampling.grammar import GrammarCache, GrammarState, apply_masks
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


def allowed(state: GrammarState, forbidden=()) -> set[int]:
    mask = torch.full(((VOCAB + 31) // 32,), -1, dtype=torch.int32)
    state.fill_mask(mask, forbidden)
    logits = torch.zeros(1, VOCAB)
    apply_masks(logits, [0], mask[None])
    return set(logits.isfinite().nonzero()[:, 1].tolist())


def feed(state: GrammarState, text: bytes) -> None:
    assert all(state.accept(byte) for byte in text)


@pytest.mark.parametrize("seed", range(5))
def test_random_choices_make_valid_json(cache, seed):
    grammar = xgrammar.GrammarCompiler(INFO).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    state = cache.start(grammar.serialize_json(), [EOS])
    rng, text = random.Random(seed), b""
    while not state.is_terminated:
        token = rng.choice(sorted(allowed(state)))
        assert state.accept(token)
        text += TOKENS[token] if token != EOS else b""
    answer = json.loads(text)
    assert set(answer) == {"ok", "n"}
    assert isinstance(answer["ok"], bool)
    assert 0 <= answer["n"] <= 99


def test_what_the_grammar_forbids_is_not_accepted_and_changes_nothing(cache):
    state = cache.start(compiled("ab+"), [EOS])
    assert not state.accept(ord("b"))
    assert not state.accept(EOS)
    assert allowed(state) == {ord("a")}
    feed(state, b"ab")
    assert allowed(state) == {ord("b"), EOS}


def test_only_stop_tokens_follow_the_end(cache):
    state = cache.start(compiled("ab"), [EOS, EOT])
    feed(state, b"ab")
    assert not state.is_terminated
    assert allowed(state) == {EOS, EOT}
    assert state.accept(EOT)
    assert state.is_terminated
    assert allowed(state) == {EOS, EOT}
    assert not state.accept(ord("a"))
    assert state.accept(EOS)


def test_rollback_also_over_the_end(cache):
    state = cache.start(compiled("abc"), [EOS])
    feed(state, b"abc")
    state.accept(EOS)
    state.accept(EOS)
    state.rollback(1)
    assert state.is_terminated
    state.rollback(3)
    assert not state.is_terminated
    assert allowed(state) == {ord("b")}


def test_forbidden_tokens_give_way_when_nothing_else_is_left(cache):
    state = cache.start(compiled("ab*"), [EOS])
    feed(state, b"a")
    assert allowed(state, [EOS, 31, 299]) == {ord("b")}
    state = cache.start(compiled("a"), [EOS])
    feed(state, b"a")
    assert allowed(state, [EOS]) == {EOS}


def test_without_stop_tokens_the_tokenizer_names_them(cache):
    state = cache.start(compiled("a"), [])
    feed(state, b"a")
    assert allowed(state) == {EOS}


def test_masks_touch_their_rows_only(cache):
    state = cache.start(compiled("[a-c]"), [EOS])
    masks = torch.zeros(1, (VOCAB + 31) // 32, dtype=torch.int32)
    state.fill_mask(masks[0])
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    masked = logits.clone()
    apply_masks(masked, [1], masks)
    assert masked[[0, 2]].equal(logits[[0, 2]])
    assert masked[1, 97:100].equal(logits[1, 97:100])


def test_cache_reads_once_and_forgets_the_least_recently_used():
    cache = GrammarCache(INFO.serialize_json(), VOCAB, capacity=2)
    a, b, c = (compiled(x) for x in "abc")
    for grammar in (a, b, a, c):
        cache.start(grammar, [EOS])
    assert len(cache) == 2
    reads: list[str] = []
    read = cache._read
    cache._read = lambda grammar: reads.append(grammar) or read(grammar)  # type: ignore[method-assign]
    for grammar in (a, c, b):
        cache.start(grammar, [EOS])
    assert reads == [b]


def test_two_requests_of_one_grammar_are_independent(cache):
    grammar = compiled("abc")
    one, two = cache.start(grammar, [EOS]), cache.start(grammar, [EOS])
    feed(one, b"ab")
    assert allowed(two) == {ord("a")}


def test_broken_or_foreign_grammars_are_refused(cache):
    other = xgrammar.TokenizerInfo(TOKENS, vocab_size=280, stop_token_ids=[EOS])
    foreign = xgrammar.GrammarCompiler(other).compile_regex("a").serialize_json()
    for grammar in ("no json", "{}", foreign):
        with pytest.raises(BadRequest, match="the grammar cannot be used"):
            cache.start(grammar, [EOS])
    assert len(cache) == 0


def test_a_vocabulary_larger_than_the_models_is_refused():
    with pytest.raises(ValueError, match="290 > the model's 289"):
        GrammarCache(INFO.serialize_json(), 289)
