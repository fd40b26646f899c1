"""Covers `stop_expression.py`."""

import itertools
from time import process_time

import pytest
import re2
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.errors import BadRequest
from multilora.front.stop import MAX_HELD, StopMatch, StopMatcher

PIECES = st.lists(st.text(alphabet="ab1\n", max_size=4), max_size=12)
STOPS = st.lists(st.text(alphabet="ab1\n", min_size=1, max_size=4), min_size=1, max_size=4)
REGEXES = [r"\d+", r"a\d", r"b+a", r"\bb1", r"^1b", r"ab|ba1", r"\n\s*1", r"[^a]1$", r"(a|b1){2,3}1", r"(?i)A1|B\nB"]
REGEXES += [r"(?:ab??)*1b", r"(?m)^b(?-m:a)$", r"[]1^]a[[:digit:]]", r"\Qab\E1", r"\x61\061b", r"(?P<x>a)+(?s:.)b"]
REGEXES += [r"(?:a{2}){1}b?1", r"\pL\p{Nd}a|(?:1|\Bb){0}ab"]


def feed_all(
    matcher: StopMatcher, pieces: list[str], passed_over: int = 0
) -> tuple[int, StopMatch | None, list[int]]:
    """Feed until a match: which piece it came with, the match, and how many characters were out after each piece."""
    out, total = [], 0
    for i, piece in enumerate(pieces):
        total += len(piece)
        match = matcher.feed(piece, may_match=i >= passed_over)
        if match:
            return i, match, out
        out.append(total - matcher.held)
    return len(pieces), None, out


def naive_strings(pieces: list[str], stops: list[str], passed_over: int) -> tuple[int, StopMatch | None]:
    """Look at the whole text after every character."""
    text = ""
    for i, piece in enumerate(pieces):
        for char in piece:
            text += char
            found = [s for s in stops if text.endswith(s)]
            if found and i >= passed_over:
                longest = max(found, key=len)
                return i, StopMatch(len(text) - len(longest), len(text), longest)
    return len(pieces), None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PIECES, STOPS, st.integers(0, 3))
def test_strings_equal_a_search_of_the_whole_text(pieces, stops, passed_over):
    turn, match, out = feed_all(StopMatcher(stops, []), pieces, passed_over)
    assert (turn, match) == naive_strings(pieces, stops, passed_over)
    assert out == sorted(out)
    if match:
        assert all(shown <= match.start for shown in out)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PIECES, STOPS)
def test_nothing_is_held_without_need(pieces, stops):
    matcher, text = StopMatcher(stops, []), ""
    for piece in pieces:
        text += piece
        if matcher.feed(piece):
            return
        needed = [k for s in stops for k in range(1, len(s)) if text.endswith(s[:k])]
        assert matcher.held == max(needed, default=0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PIECES, st.sampled_from(REGEXES))
def test_expressions_equal_a_search_of_the_whole_text(pieces, expression):
    turn, match, out = feed_all(StopMatcher([], [expression]), pieces)
    text = ""
    for i, piece in enumerate(pieces):
        text += piece
        naive = re2.search(expression, text)
        if naive:
            assert (turn, match) == (i, StopMatch(naive.start(), naive.end(), naive.group()))
            assert all(shown <= match.start for shown in out)
            return
    assert match is None


def test_a_stop_over_several_pieces():
    matcher = StopMatcher(["STOP"], [])
    assert matcher.feed("go S") is None
    assert matcher.held == 1
    assert matcher.feed("TO") is None
    assert matcher.held == 3
    assert matcher.feed("Px") == StopMatch(3, 7, "STOP")


def test_held_text_is_let_go():
    matcher = StopMatcher(["STOP"], ["S[A-Z]+E"])
    matcher.feed("STO")
    assert matcher.held == 3
    matcher.feed("x")
    assert matcher.held == 0


def test_the_first_complete_stop_counts_then_the_longest():
    assert StopMatcher(["abcd", "bc"], []).feed("abcd") == StopMatch(1, 3, "bc")
    assert StopMatcher(["c", "abc"], []).feed("xabc") == StopMatch(1, 4, "abc")
    assert StopMatcher(["zz"], [r"\d"]).feed("1zz") == StopMatch(0, 1, "1")


def test_an_expression_matches_what_is_there_with_the_piece():
    matcher = StopMatcher([], [r"\n\d+"])
    assert matcher.feed("a\n") is None
    assert matcher.held == 1
    assert matcher.feed("12 3") == StopMatch(1, 4, "\n12")


def test_passed_over_matches_never_count():
    matcher = StopMatcher(["ab"], [r"\d{2}"])
    assert matcher.feed("ab 12 ", may_match=False) is None
    assert matcher.feed("a") is None
    assert matcher.feed("b") == StopMatch(6, 8, "ab")
    complete = StopMatcher([], [r"\d\d"])
    assert complete.feed("12", may_match=False) is None
    assert complete.feed("x") is None


def test_an_expression_may_begin_before_matching_is_allowed():
    matcher = StopMatcher([], [r"\d{3}"])
    assert matcher.feed("x12", may_match=False) is None
    assert matcher.held == 2
    assert matcher.feed("3") == StopMatch(1, 4, "123")
    longer = StopMatcher([], [r"\d+"])
    assert longer.feed("x12", may_match=False) is None
    assert longer.held == 2
    assert longer.feed("3") == StopMatch(1, 4, "123")


def test_a_string_after_a_long_text():
    matcher = StopMatcher(["abc"], [])
    for _ in range(1000):
        matcher.feed("abab")
    assert matcher.feed("c") == StopMatch(3998, 4001, "abc")


@pytest.mark.parametrize(
    ("expression", "says"), [("(a", "not a regular expression"), ("a*", "empty text"), ("a|", "empty text")]
)
def test_bad_expressions(expression, says):
    with pytest.raises(BadRequest, match=says) as e:
        StopMatcher([], [expression])
    assert e.value.param == "stop_regex"


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        (r"(a)\1", "backreference"),
        ("(?<=a)b", "lookaround"),
        ("a(?=b)", "lookaround"),
        ("((a{1000}){1000}){1000}", "repetition"),
        ("(?:.{30}){30}", "too large"),
        ("a" * 600, "600 characters"),
        ("(" * 60 + "a" + ")" * 60, "50 groups"),
        ("\ud800", "Unicode"),
    ],
)
def test_what_cannot_be_matched_in_linear_time_is_refused_by_name(expression, says):
    start = process_time()
    with pytest.raises(BadRequest, match=says):
        StopMatcher([], [expression])
    assert process_time() - start < 0.5


@pytest.mark.parametrize(
    "expression", ["(x+x+)+y", "(?:a|aa)+[cd]", "(.*)*(.*)*z", "(?:a?){60}a{60}c", "(?:a|b)*a(?:a|b){90}c"]
)
def test_no_expression_explodes(expression):
    """The first three took exponential time with a backtracking engine, 0.2 s and then an error."""
    matcher, slowest = StopMatcher([], [expression]), 0.0
    for _ in range(3000):
        start = process_time()
        assert matcher.feed("axab") is None
        slowest = max(slowest, process_time() - start)
    assert slowest < 0.1
    assert matcher.held <= MAX_HELD + 4


def test_ten_thousand_strings_cost_as_much_as_one():
    matcher = StopMatcher([f"{i} is never said" for i in range(10_000)], [])
    start = process_time()
    for _ in range(2000):
        matcher.feed("12 is nev")
    assert process_time() - start < 1
    assert matcher.held == 9
    assert matcher.feed("er said") == StopMatch(17991, 18007, "12 is never said")


def test_a_beginning_too_long_ago_is_given_up():
    matcher = StopMatcher([], ["a[^z]*z"])
    matcher.feed("a" + "é" * MAX_HELD)
    assert matcher.held == MAX_HELD // 2
    assert matcher.feed("z") is None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(alphabet="ab1\n", max_size=8), st.sampled_from(REGEXES))
def test_no_more_is_held_than_may_become_a_match(text, expression):
    """Some continuation, tried up to four characters, makes a match that begins where the held text does."""
    matcher = StopMatcher([], [expression])
    if matcher.feed(text) is not None or not matcher.held or "\\b" in expression.lower():
        return
    start = len(text) - matcher.held
    endings = ("".join(more) for size in range(5) for more in itertools.product("ab1\n", repeat=size))
    assert any((m := re2.search(expression, text + e)) and m.start() == start for e in endings)
