"""PEFT's rules for which names a pattern means, as PEFT 0.21 applies them.

Module names are those inside the base model: "model.layers.0.self_attn.q_proj".
Patterns come from untrusted files, so their size is bounded, and each match has a time limit.
Called by `config.py`.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence

import regex

MATCH_SECONDS = 1.0  # a real pattern takes microseconds; catastrophic backtracking must not block the loader
MAX_PATTERN = 1 << 16  # characters, compiled in some 0.3 s; naming each of 500 modules takes 17,000
MAX_COPIES = 1 << 16  # "a{n}" is compiled to n copies of a, "(a{n}){m}" to n·m
MAX_KEYS = 1000  # regular expressions among the keys of rank_pattern or alpha_pattern; plain names are not counted
COUNT = re.compile(r"\{([0-9]+)(?:,[0-9]*)?\}")

PLAIN_KEY = re.compile(r"[A-Za-z0-9_.]+")


class PatternError(ValueError):
    """The pattern is not a valid regular expression, or is too large or too slow."""


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> "regex.Pattern[str]":
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"a regular expression of {len(pattern)} characters, at most {MAX_PATTERN} are allowed")
    counts = COUNT.findall(pattern)
    if any(len(n) > 9 for n in counts) or math.prod(int(n) or 1 for n in counts) > MAX_COPIES:
        raise PatternError("the regular expression repeats something too often")
    try:
        re.compile(pattern)  # what PEFT would accept
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as e:
        raise PatternError(f"not a valid regular expression: {e}") from None


def _match(pattern: str, name: str, full: bool = False) -> "regex.Match[str] | None":
    compiled = _compile(pattern)
    try:
        return (compiled.fullmatch if full else compiled.match)(name, timeout=MATCH_SECONDS)
    except TimeoutError:
        raise PatternError("the regular expression takes too long") from None


def pattern_key(patterns: Iterable[str], name: str) -> str | None:
    """The first key of rank_pattern or alpha_pattern that means `name`: a regex for it or for a dotted tail of it."""
    tried = 0
    for key in patterns:
        if _cannot_match(key, name):
            continue
        tried += 1
        if tried > MAX_KEYS:
            raise PatternError(f"over {MAX_KEYS} regular expressions")
        if _match(rf"(.*\.)?({key})$", name):
            return key
    return None


def _cannot_match(key: str, name: str) -> bool:
    """A cheap test for keys without regex syntax but dots: an adapter may have one key for each of its modules."""
    return PLAIN_KEY.fullmatch(key) is not None and not name.endswith(key[key.rfind(".") + 1 :])


def matches_modules(modules: str | Sequence[str], name: str) -> bool:
    """Whether target_modules or exclude_modules means `name`: a string is a regex for the full name, a list holds
    names or dotted tails of names."""
    if isinstance(modules, str):
        return _match(modules, name, full=True) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def layer_index(layers_pattern: Sequence[str], name: str) -> int | None:
    """The layer of `name` as layers_to_transform counts it: the first number after the pattern (or any name)."""
    if not layers_pattern:
        found = _match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
        return int(found["idx"]) if found else None
    for pattern in layers_pattern:
        found = _match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
        if found:
            return int(found["idx"])
    return None


def is_part_of(entry: str, name: str) -> bool:
    """Whether an entry of modules_to_save keeps LoRA off `name`: a regex for it, or for a module that it lies in."""
    if _cannot_match_part(entry, name):
        return False
    return _match(rf"(^|.*\.){entry}($|\..*)", name) is not None


def _cannot_match_part(entry: str, name: str) -> bool:
    return PLAIN_KEY.fullmatch(entry) is not None and entry.rpartition(".")[2] not in name


def belongs_to(entry: str, name: str) -> bool:
    """Whether an entry of modules_to_save means `name`, or a module that it lies in: their names end with it.

    As PEFT has it: not at a dot, so that "norm" means "input_layernorm" too.
    """
    while name and not name.endswith(entry):
        name = name.rpartition(".")[0]
    return bool(name)
