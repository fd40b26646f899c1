"""Which modules of a quantised base model stay in 16 bit, by the patterns of its config.json."""

import re
from collections.abc import Callable, Iterable, Sequence

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
    begins = re.compile(rf"(?:{'|'.join(f'(?:{_expression(p)})' for p in ends)})(?:(?<=\.)|(?=\.|$))")
    return lambda path: path.endswith(ends) or begins.match(path) is not None


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
    return pattern


def is_of_experts(path: str) -> bool:
    """Whether the layer at the path is an expert's, or chooses between experts, going by its name."""
    return path.rpartition(".")[2] in ROUTERS or ".experts." in path
