"""Which modules of a quantised base model stay in 16 bit, by the patterns of its config.json."""

import re
from collections.abc import Callable, Iterable, Sequence

from multilora.errors import ModelUnsupported

ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "score"})
"""Last names of small layers that choose between experts: never quantised while a checkpoint is loaded."""

OLDER = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""The matrices of a Mixtral's experts."""


def skips(patterns: Sequence[str] | None) -> Callable[[str], bool]:
    """Whether a path is excluded by transformers' rule: a pattern is the beginning of the path, or a regular
    expression for one, up to the end of one of its names; or it is the end of the path."""
    ends = tuple(patterns or ())
    if not ends:
        return lambda _path: False
    plain: list[str] = []
    own: list[str] = []  # a pattern with groups may name them by number, which those of others would change
    for expression in map(_expression, ends):
        (own if re.compile(expression).groups else plain).append(expression)
    begins = [_beginning("|".join(f"(?:{expression})" for expression in plain))] if plain else []
    begins += map(_beginning, own)
    return lambda path: path.endswith(ends) or any(found.match(path) is not None for found in begins)


def _beginning(expression: str) -> re.Pattern[str]:
    """What matches a path that begins with the expression, up to the end of one of its names."""
    return re.compile(rf"(?:{expression})(?:(?<=\.)|(?=\.|$))")


def ends_with(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a path ends with one of these names, which may have several components: "self_attn.q_proj"; those of a
    Mixtral's experts may be older ones, "block_sparse_moe.experts.0.w1"."""
    found = tuple(_present(f".{name}") for name in names)
    return lambda path: f".{path}".endswith(found)


def _present(name: str) -> str:
    """The name that is in use now of what had another one in Mixtral."""
    parent, is_expert, own = name.partition(".block_sparse_moe.experts.")
    if not is_expert:
        return name
    number, _, matrix = own.partition(".")
    return f"{parent}.mlp.experts.{number}.{OLDER.get(matrix, matrix)}"


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error:
        return re.escape(pattern)
    try:
        _beginning(pattern)
    except re.error as e:  # flags for all of an expression, which is not all of it here
        raise ModelUnsupported(f"quantization_config: the pattern {pattern!r:.200} is not supported: {e}") from None
    return pattern


def is_of_experts(path: str) -> bool:
    """Whether the layer at the path is an expert's, or chooses between experts, going by its name."""
    return path.rpartition(".")[2] in ROUTERS or ".experts." in path
