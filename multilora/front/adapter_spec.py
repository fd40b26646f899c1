"""What `lora_path` may say: which adapters, by name, act on each item of a request.

    null                                              the base model
    "a"                                               adapter or named composition a
    [{"name": "a", "weight": 0.7}, {"name": "b"}]     a composition: the weighted sum; a weight left out is 1

One of these is for all items; a list of them has one for each. So a list of nothing but objects is one composition
for all items, and where items differ each composition is a list of its own.
This module knows only names, not which adapters are loaded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from multilora.errors import BadRequest

AdapterSpec = tuple[tuple[str, float], ...]
"""(name, weight) of each adapter; () is the base model, (("a", 1.0),) plainly a."""

BASE: AdapterSpec = ()
MAX_WEIGHT = 1e6


def parse_specs(value: Any, count: int) -> list[AdapterSpec]:
    """The choice of each of `count` items. Raises BadRequest."""
    if not isinstance(value, list | tuple) or _is_composition(value):
        return [parse_spec(value)] * count
    if len(value) != count:
        raise BadRequest(f"lora_path has {len(value)} entries for {count} inputs", param="lora_path")
    return [parse_spec(entry, f"lora_path[{i}]") for i, entry in enumerate(value)]


def parse_spec(value: Any, what: str = "lora_path") -> AdapterSpec:
    """`what`: the field, for messages."""
    if value is None:
        return BASE
    if isinstance(value, str):
        return ((value, 1.0),)
    if isinstance(value, Mapping):
        raise _bad(f"{what}: a composition is a list of objects; put this one into a list of its own")
    if not isinstance(value, list | tuple):
        raise _bad(f"{what} = {value!r:.60}: must be a name, null, or a list of {{name, weight}}")
    return parse_composition(value, what)


def parse_composition(parts: list[Any] | tuple[Any, ...], what: str = "lora_path") -> AdapterSpec:
    """A list of {name, weight}, each name once. Weights are finite, of any sign; 0 leaves the adapter out."""
    if not parts:
        raise _bad(f"{what}: an empty composition; null is the base model")
    spec = tuple([_part(part, f"{what}[{i}]") for i, part in enumerate(parts)])
    name, count = Counter(name for name, _ in spec).most_common(1)[0]
    if count > 1:
        raise _bad(f"{what}: adapter {name!r} comes twice; add its weights")
    return spec


def names_in(value: Any, depth: int = 2) -> Iterator[str]:
    """The names in a `lora_path` of any form; what is not well-formed is left out. depth: of lists within lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from names_in(value.get("name"), 0)
    elif isinstance(value, list | tuple) and depth:
        for entry in value:
            yield from names_in(entry, depth - 1)


def show(spec: AdapterSpec) -> str:
    """For people: "0.7 * a + b"."""
    return " + ".join(name if weight == 1.0 else f"{weight:g} * {name}" for name, weight in spec)


def _is_composition(value: list[Any] | tuple[Any, ...]) -> bool:
    return bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _part(part: Any, what: str) -> tuple[str, float]:
    if not isinstance(part, Mapping) or not part.keys() <= {"name", "weight"} or "name" not in part:
        raise _bad(f"{what} = {part!r:.60}: each part of a composition is {{name, weight}}")
    name, weight = part["name"], part.get("weight", 1.0)
    if not isinstance(name, str):
        raise _bad(f"{what}.name = {name!r:.60}: must be the name of an adapter; the base model is always there")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise _bad(f"{what}.weight = {weight!r:.60}: must be a number")
    if not abs(weight) <= MAX_WEIGHT:  # which NaN is not either
        raise _bad(f"{what}.weight = {weight!r:.60}: must be a finite number, at most {MAX_WEIGHT:g}")
    return name, float(weight)


def _bad(message: str) -> BadRequest:
    return BadRequest(message, param="lora_path")
