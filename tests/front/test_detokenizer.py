import pytest
from fakes.tokenizers import byte_level_tokenizer, metaspace_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.front.detokenizer import Detokenizer

BYTES = byte_level_tokenizer()
META = metaspace_tokenizer()
TEXTS = st.text(alphabet="thecat and日本語🙂é\n.x�", max_size=30)


def byte_ids(data: bytes) -> list[int]:
    return [META.hf.convert_tokens_to_ids(f"<0x{b:02X}>") for b in data]


def stream(tokenizer, ids, sizes, skip_special_tokens=True) -> list[str]:
    """Push the ids in chunks of these sizes (repeated), then finish."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    out, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        out.append(detokenizer.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*out, detokenizer.finish()]


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, BYTES.vocab_size + 3), max_size=60), SIZES, st.booleans())
def test_any_byte_level_ids(ids, sizes, skip):
    """Also broken UTF-8, special tokens in between and ids that the tokenizer does not know."""
    assert "".join(stream(BYTES, ids, sizes, skip)) == BYTES.decode(ids, skip_special_tokens=skip)


def byte_level_ids(data: bytes) -> list[int]:
    """The one-byte tokens of BYTES (its vocabulary spells them in GPT-2's alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b if b in printable else 256 + others.index(b)) for b in data]
    return BYTES.hf.convert_tokens_to_ids(letters)


HIGH_BYTES = [i for i in range(BYTES.vocab_size) if "\ufffd" in BYTES.decode([i])]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(HIGH_BYTES), max_size=80), SIZES)
def test_mostly_broken_bytes(ids, sizes):
    """Runs of continuation and lead bytes: long enough to be put out before they are over."""
    assert "".join(stream(BYTES, ids, sizes)) == BYTES.decode(ids)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TEXTS, SIZES, st.sampled_from([BYTES, META]))
def test_any_text(text, sizes, tokenizer):
    ids = tokenizer.encode(text)
    out = stream(tokenizer, ids, sizes)
    assert "".join(out) == tokenizer.decode(ids)


WORDS = st.integers(0, META.vocab_size - 1).filter(lambda i: i not in byte_ids(bytes(range(256)))).map(lambda i: [i])
CHARACTERS = st.sampled_from("日🙂é\nx").map(lambda c: byte_ids(c.encode()))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(WORDS | CHARACTERS, max_size=30), st.integers(0, 3), SIZES, st.booleans())
def test_metaspace_and_byte_fallback(units, broken, sizes, skip):
    """Words, special tokens and whole characters in any order; at the end perhaps a piece of a character."""
    the = META.hf.convert_tokens_to_ids("▁the")
    ids = [i for unit in units for i in unit] + [the, *byte_ids("🙂".encode()[:broken])]
    assert "".join(stream(META, ids, sizes, skip)) == META.decode(ids, skip_special_tokens=skip)


def test_a_character_comes_out_when_it_is_complete():
    ids = byte_ids("🙂".encode())
    assert stream(META, ids, [1]) == ["", "", "", "🙂", ""]
    assert stream(BYTES, byte_level_ids("🙂".encode()), [1]) == ["", "", "", "🙂", ""]


@pytest.mark.parametrize("broken", range(8, 24))
@pytest.mark.parametrize("lead", [b"\xff", b"\xf0\x9f\x99"])
def test_a_character_after_many_broken_bytes(broken, lead):
    """Wherever what is pending is cut short, never within a character."""
    ids = byte_level_ids((lead * broken)[:broken] + "🙂".encode() + b"x")
    assert "".join(stream(BYTES, ids, [1])) == BYTES.decode(ids)


def test_tokens_of_text_and_half_a_character():
    """Their text comes out at once and once, however many follow each other."""
    token = next(
        i for i in range(3, BYTES.vocab_size) if BYTES.decode([i]).rstrip("\ufffd") not in ("", BYTES.decode([i]))
    )
    ids = [token] * 50
    out = stream(BYTES, ids, [1])
    assert "".join(out) == BYTES.decode(ids)
    assert out[0] == BYTES.decode([token]).rstrip("\ufffd")


def test_text_before_a_broken_end_is_not_held_back():
    newline, lead = byte_ids(b"\n"), byte_ids(b"\xe6")
    detokenizer = Detokenizer(META)
    assert detokenizer.push(newline) == "\n"
    assert detokenizer.push(lead) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_broken_run_keeps_its_valid_beginning():
    """Where decode gives U+FFFD for every byte of the run: here it says what it knows at once."""
    ids = [*byte_ids("\n日".encode()), *byte_ids(b"\xe6\x97"), META.hf.convert_tokens_to_ids("he")]
    assert META.decode(ids) == "\ufffd" * 6 + "he"
    assert "".join(stream(META, ids, [1])) == "\n日\ufffd\ufffdhe"


@pytest.mark.parametrize("token", [byte_ids(b"\xff")[0], 2000])
def test_endless_broken_tokens_keep_little_pending(token):
    detokenizer = Detokenizer(META)
    text = "".join(detokenizer.push([token]) for _ in range(1000))
    assert len(detokenizer._pending) <= 16
    assert text + detokenizer.finish() == META.decode([token] * 1000)


def test_skipped_special_tokens_do_not_swallow_spaces():
    the = META.hf.convert_tokens_to_ids("▁the")
    assert stream(META, [the, 2, the], [1]) == ["the", "", " the", ""]
    assert "".join(stream(META, [the, 2, the], [1], skip_special_tokens=False)) == META.decode(
        [the, 2, the], skip_special_tokens=False
    )


def test_cost_does_not_grow_with_the_length():
    lengths = []

    class Counting(type(META)):
        def decode(self, ids, **kwargs):
            lengths.append(len(ids))
            return super().decode(ids, **kwargs)

    ids = META.encode("the cat 日本語 " * 200)
    stream(Counting(META.hf), ids, [1])
    assert max(lengths) < 20
    assert len(lengths) < 4 * len(ids)
