import pytest
from fakes.tokenizers import byte_level_tokenizer, metaspace_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.engine.messages import Finished, Logprobs, Output
from multilora.errors import BadRequest
from multilora.front import stop
from multilora.front.stream import FinishReason, TextStream
from multilora.params import SamplingParams

BYTES = byte_level_tokenizer()
META = metaspace_tokenizer()
EOS = 1


def ids_of(text: str, tokenizer=BYTES) -> list[int]:
    return tokenizer.encode(text)[1:]


def one_by_one(text: str) -> list[int]:
    """One token per character, so that stop strings span tokens."""
    return [i for char in text for i in ids_of(char)]


def stream(tokenizer=BYTES, **params) -> TextStream:
    return TextStream(tokenizer, SamplingParams(**params), eos_token_ids=(EOS, 9))


def output(token_ids=(), finished: str | None = None, matched: int | None = None, **fields) -> Output:
    end = Finished(finished, matched=matched, message=fields.pop("message", "")) if finished else None
    return Output(rid="r", token_ids=list(token_ids), finished=end, **fields)


def test_plain_text_to_the_limit():
    s = stream()
    ids = ids_of("the cat 日本")
    deltas = [s.push(output([i], cached_tokens=2)) for i in ids[:-1]] + [s.push(output(ids[-1:], "length"))]
    assert "".join(d.text for d in deltas) == s.text == "the cat 日本"
    assert s.token_ids == ids
    assert [d.finished for d in deltas] == [None] * (len(ids) - 1) + [FinishReason("length", length=len(ids))]
    assert (s.cached_tokens, s.completion_tokens) == (2, len(ids))
    assert not any(d.drop for d in deltas)


def test_nothing_follows_the_end():
    s = stream()
    s.push(output([5], "length"))
    with pytest.raises(AssertionError, match="after its end"):
        s.push(output([6]))


@pytest.mark.parametrize("trim", [True, False])
def test_eos_is_counted_but_not_shown(trim):
    s = stream(no_stop_trim=not trim)
    delta = s.push(output([*ids_of("cat"), EOS], "stop", matched=EOS))
    assert s.text == "cat"
    assert s.token_ids[-1] == EOS
    assert delta.finished == FinishReason("stop", matched=EOS)
    assert delta.finished.native() == {"type": "stop", "matched": EOS}
    assert not delta.drop


def test_eos_is_not_shown_with_special_tokens_either():
    s = stream(skip_special_tokens=False)
    s.push(output([2, *ids_of("cat"), EOS], "stop", matched=EOS))
    assert s.text == "<|im|>cat"
    kept = stream(skip_special_tokens=False, no_stop_trim=True)
    kept.push(output([*ids_of("cat"), EOS], "stop", matched=EOS))
    assert kept.text == "cat</s>"


@pytest.mark.parametrize(("no_trim", "text"), [(False, "ca"), (True, "cat")])
def test_an_ordinary_stop_token(no_trim, text):
    ids = one_by_one("cat")
    s = stream(stop_token_ids=[ids[-1]], no_stop_trim=no_trim)
    s.push(output(ids, "stop", matched=ids[-1]))
    assert s.text == text
    assert s.token_ids == ids


def test_an_ending_that_does_not_name_its_eos():
    s = stream()
    assert s.push(output([5, 9], "stop")).finished == FinishReason("stop", matched=9)


@pytest.mark.parametrize(("no_trim", "text"), [(False, "the "), (True, "the dog")])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_stop_string_cuts_at_the_completing_token(no_trim, text, chunk):
    ids = one_by_one("the dog and")
    s = stream(stop=["dog", "never"], no_stop_trim=no_trim)
    at = 0
    while s.finished is None:
        tokens = ids[at : at + chunk]
        delta = s.push(output(tokens, logprobs=[Logprobs(-0.5, [(-0.5, 1)])] * len(tokens)))
        at += chunk
        assert s.text in text
    assert s.text == text
    assert s.token_ids == one_by_one("the dog")
    assert len(s.logprobs) == s.completion_tokens == 7
    assert delta.finished == FinishReason("stop", matched="dog")
    assert delta.drop


def test_what_may_be_a_stop_is_held_back_and_flushed():
    s = stream(stop="dog")
    ids = one_by_one("a dodo")
    assert [s.push(output([i])).text for i in ids] == ["a", " ", "", "", "do", ""]
    assert s.push(output(one_by_one("x"), "length")).text == "dox"
    ended = stream(stop="dog")
    assert ended.push(output(one_by_one("a do"))).text == "a "
    assert ended.push(output([], "abort", message="client left")).text == "do"
    assert ended.text == "a do"
    assert ended.finished.native() == {"type": "abort", "message": "client left"}


def test_a_stop_string_in_the_last_output_wins_and_needs_no_drop():
    s = stream(stop="g")
    delta = s.push(output([*one_by_one("dog x"), EOS], "stop", matched=EOS))
    assert delta.finished == FinishReason("stop", matched="g")
    assert s.text == "do"
    assert s.token_ids == one_by_one("dog")
    assert not delta.drop


def test_text_after_the_stop_in_the_same_token_is_cut():
    token = BYTES.hf.convert_tokens_to_ids("the")
    for no_trim, text in [(False, "t"), (True, "th")]:
        s = stream(stop="h", no_stop_trim=no_trim)
        s.push(output([token]))
        assert s.text == text


def test_min_new_tokens():
    ids = one_by_one("aXbXc")
    s = stream(stop="X", min_new_tokens=3)
    s.push(output(ids))
    assert s.text == "aXb"
    assert s.completion_tokens == 4
    exactly = stream(stop="X", min_new_tokens=2)
    exactly.push(output(ids))
    assert exactly.text == "a"


def test_a_stop_regex_reports_the_text_it_matched():
    s = stream(stop_regex=r"\n[a-z]+\.")
    delta = s.push(output(one_by_one("the\ncat. x")))
    assert delta.finished.native() == {"type": "stop", "matched": "\ncat."}
    assert s.text == "the"
    assert s.completion_tokens == len(one_by_one("the\ncat."))


def test_a_stop_regex_that_takes_too_long_ends_its_request(monkeypatch):
    monkeypatch.setattr(stop, "MAX_SECONDS", 0.0)
    s = stream(stop_regex=r"(?:a|b)*a(?:a|b){300}c")
    delta = s.push(output(one_by_one("a" * 60)))
    assert delta.drop
    assert delta.finished.type == "error"
    assert delta.finished.kind == "BadRequest"
    assert delta.finished.openai() == "abort"


def test_a_newline_stop_in_byte_fallback_tokens_stops_at_once():
    newline = META.hf.convert_tokens_to_ids("<0x0A>")
    s = stream(META, stop="\n\n")
    ids = [*ids_of("the", META), newline, newline, *ids_of("cat", META)]
    s.push(output(ids))
    assert s.text == "the"
    assert s.completion_tokens == len(ids_of("the", META)) + 2


def test_logprobs_add_up():
    s = stream()
    first = s.push(output([5], logprobs=[Logprobs(-1.0)], input_logprobs=[None, Logprobs(-2.0, [(-2.0, 6)])]))
    s.push(output([6, 7], "length", logprobs=[Logprobs(-3.0), Logprobs(-4.0)]))
    assert first.input_logprobs == s.input_logprobs == [None, Logprobs(-2.0, [(-2.0, 6)])]
    assert s.logprobs == [Logprobs(-1.0), Logprobs(-3.0), Logprobs(-4.0)]


def test_ids_only():
    s = stream(None)
    s.push(output([5, 6]))
    delta = s.push(output([EOS], "stop", matched=EOS))
    assert (s.text, delta.text, s.token_ids) == ("", "", [5, 6, EOS])
    with pytest.raises(BadRequest, match="tokenizer"):
        stream(None, stop="x")


def test_error_ending():
    s = stream()
    s.push(Output(rid="r", finished=Finished("error", message="boom", kind="AdapterInvalid")))
    assert s.finished == FinishReason("error", message="boom", kind="AdapterInvalid")
    assert s.finished.native() == {"type": "error", "message": "boom", "kind": "AdapterInvalid"}


def test_bad_stop_regex_is_refused_when_made():
    with pytest.raises(BadRequest, match="stop_regex"):
        stream(stop_regex="(")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.text(alphabet="thea 日🙂\n", max_size=20),
    st.lists(st.text(alphabet="thea 日\n", min_size=1, max_size=3), max_size=2),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from([BYTES, META]),
)
def test_chunking_changes_nothing(text, stops, sizes, tokenizer):
    """Whatever comes together, text, tokens and ending are those of one token at a time."""

    def run(sizes: list[int]) -> tuple[str, list[int], FinishReason | None]:
        s, at, turn, deltas = stream(tokenizer, stop=stops), 0, 0, []
        ids = ids_of(text, tokenizer)
        while s.finished is None:
            size = sizes[turn % len(sizes)]
            last = at + size >= len(ids)
            deltas.append(s.push(output(ids[at : at + size], "length" if last else None)))
            at, turn = at + size, turn + 1
        assert "".join(d.text for d in deltas) == s.text
        assert [i for d in deltas for i in d.token_ids] == s.token_ids
        return s.text, s.token_ids, s.finished

    whole, ids, reason = run([1])
    assert run(sizes) == (whole, ids, reason)
    if reason.type == "length":
        assert whole == tokenizer.decode(ids_of(text, tokenizer))
        assert not any(stop in whole for stop in stops)
    else:
        assert tokenizer.decode(ids).startswith(whole + reason.matched)
