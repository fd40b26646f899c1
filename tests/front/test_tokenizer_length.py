"""The bound on a text's tokens holds for whatever the tokenizers do to texts, or there is none."""

import json

import pytest
from fakes.tokenizers import byte_level_tokenizer, metaspace_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.demo import base_model_path
from multilora.front.tokenizer import Tokenizer
from multilora.front.tokenizer_length import shrinking

TOKENIZERS = [byte_level_tokenizer(), metaspace_tokenizer(), Tokenizer.load(str(base_model_path()))]
PLAIN = json.loads(TOKENIZERS[0].hf.backend_tokenizer.to_str())
STRIPPING = {"content": "<x>", "lstrip": False, "rstrip": True}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60) | st.sampled_from([" " * 500, "a" * 500, "</s>" * 50]))
def test_no_text_has_fewer_tokens(text):
    for tokenizer in TOKENIZERS:
        assert tokenizer.most_bytes_per_token is not None
        count = len(tokenizer.encode(text, add_special_tokens=False))
        assert count >= len(text.encode()) // tokenizer.most_bytes_per_token


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 1),
        ({"normalizer": {"type": "NFC"}}, 4),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend"}]}}, 4),
        ({"normalizer": {"type": "Lowercase"}}, None),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}}, None),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}}, None),
        ({"pre_tokenizer": {"type": "Whitespace"}}, None),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Removed"}}, None),
        ({"model": {"type": "WordPiece"}}, None),
        ({"model": {"type": "BPE", "fuse_unk": True, "byte_fallback": False}}, None),
        ({"added_tokens": [STRIPPING]}, None),
    ],
)
def test_what_drops_text_has_no_bound(change, expected):
    assert shrinking(PLAIN | change) == expected
