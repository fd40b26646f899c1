"""How much shorter than its text the tokens of a text can be, from the JSON of a fast tokenizer (`tokenizer.json`).

So a prompt that cannot fit the context is known before it is tokenized. Called by `tokenizer.py`.
"""

from typing import Any

_NFC = 4
"""Composing characters makes a text at most three times as short (Hangul)."""


def shrinking(tokenizer: dict[str, Any]) -> int | None:
    """The tokens of a text stand for at least its UTF-8 bytes divided by this; None: any number of bytes may go."""
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    if any(token["lstrip"] or token["rstrip"] for token in added):
        return None  # one token takes any number of spaces
    if model["type"] != "BPE" or (model.get("fuse_unk") and not model.get("byte_fallback")):
        return None  # one token stands for any number of unknown characters
    if not _keeps_all(tokenizer["pre_tokenizer"]):
        return None
    return _normalized(tokenizer["normalizer"])


def _keeps_all(splitter: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer drops nothing."""
    if splitter is None or splitter["type"] in ("ByteLevel", "Metaspace", "Digits"):
        return True
    if splitter["type"] == "Split":
        return bool(splitter["behavior"] != "Removed")
    return splitter["type"] == "Sequence" and all(map(_keeps_all, splitter["pretokenizers"]))


def _normalized(normalizer: dict[str, Any] | None) -> int | None:
    if normalizer is None or normalizer["type"] == "Prepend":
        return 1
    if normalizer["type"] == "NFC":
        return _NFC
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String", "")
        return 1 if pattern and len(normalizer["content"].encode()) >= len(pattern.encode()) else None
    if normalizer["type"] != "Sequence":
        return None
    total = 1
    for one in map(_normalized, normalizer["normalizers"]):
        if one is None:
            return None
        total *= one
    return total
