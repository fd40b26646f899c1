"""How one start-up option is declared: default, help, group and allowed values, beside the field it belongs to.

Owns the conversion of a dataclass of `option(...)` fields into `Option` records, from which both the checks of
`config.py` and the flags of `cli/parser.py` are made, so that the two cannot drift. Knows no option by name.
"""

import dataclasses
import importlib
import re
from dataclasses import dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from multilora.errors import ConfigError

T = TypeVar("T")

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


@dataclass(frozen=True)
class KeysOf:
    """Choices that are the keys of a table of implementations: `module:NAME`, imported when they are first asked for.

    The table stands beside the implementations, in packages that this file is below of; it is the only list of their
    names. Its module must be light, since `--help` imports it.
    """

    table: str

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The names, in the order of the table."""
        module, _, name = self.table.partition(":")
        return tuple(getattr(importlib.import_module(module), name))


Choices = tuple[str | int | KeysOf, ...]


def option(
    default: T,
    help: str,
    *,
    group: str,
    aliases: tuple[str, ...] = (),
    low: int | None = 1,
    high: int | None = None,
    size: bool = False,
    metavar: str | None = None,
    choices: Choices = (),
) -> T:
    """A dataclass field that is also a flag.

    `low`, `high`: bounds of an integer, both included. `size`: bytes, for which `8GiB` is understood too.
    `choices`: the allowed values; empty: any.
    """
    metadata = dict(
        help=help,
        group=group,
        aliases=aliases,
        low=low,
        high=high,
        size=size,
        metavar=metavar,
        declared_choices=choices,
    )
    return dataclasses.field(default=default, metadata=metadata)


def parse_size(text: str) -> int:
    """Bytes of `4096`, `512M`, `8GiB`, `1.5g`: letters alone and `iB` are powers of 1024, `KB`, `MB`, … of 1000.

    Raises ConfigError.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write for example 4096, 512M or 8GiB")
    number, unit, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" else 1024
    return round(float(number) * int(base ** _UNITS[unit.lower()]))


@dataclass(frozen=True)
class Option:
    """One option, with its type taken apart."""

    name: str
    type: type  # of one value: bool, int, float, str, or a record such as LoraPath
    many: bool  # a tuple of such values
    optional: bool  # None is allowed
    declared_choices: Choices
    default: Any
    help: str
    group: str
    aliases: tuple[str, ...]
    low: int | None
    high: int | None
    size: bool
    metavar: str | None

    @property
    def choices(self) -> tuple[str | int, ...]:
        """The allowed values; empty: any."""
        tables = (c.keys if isinstance(c, KeysOf) else (c,) for c in self.declared_choices)
        return tuple(value for values in tables for value in values)

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Type, allowed values and bounds of one value. Raises ConfigError naming flag and value."""
        if value is None and self.optional:
            return
        if self.many and not isinstance(value, tuple):
            raise self._error("a list", value)
        for item in value if self.many else (value,):
            self._check_one(item)

    def _check_one(self, value: Any) -> None:
        if choices := self.choices:
            if value not in choices or isinstance(value, bool):
                raise self._error(f"one of {', '.join(map(str, choices))}", value)
        elif self.type is int:
            if not isinstance(value, int) or isinstance(value, bool) or not self._within(value):
                raise self._error(self._integer_rule(), value)
        elif self.type is float:
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise self._error("a number", value)
        elif not isinstance(value, self.type):
            raise self._error({bool: "true or false", str: "text"}.get(self.type, self.type.__name__), value)

    def _within(self, value: int) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def _integer_rule(self) -> str:
        if self.high is not None:
            return f"an integer between {self.low} and {self.high}"
        return "a positive integer" if self.low == 1 else "an integer"

    def _error(self, rule: str, value: Any) -> ConfigError:
        return ConfigError(f"{self.flag} must be {rule}, is {value!r}")


def options_of(cls: type[Any]) -> tuple[Option, ...]:
    """The options of a dataclass whose fields are all made with `option`, in order."""
    hints = get_type_hints(cls)
    return tuple(_option(field, hints[field.name]) for field in dataclasses.fields(cls))


def _option(field: "dataclasses.Field[Any]", hint: Any) -> Option:
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    if optional:
        (hint,) = [arg for arg in get_args(hint) if arg is not NoneType]
    many = get_origin(hint) is tuple
    if many:
        hint = get_args(hint)[0]
    return Option(field.name, type=hint, many=many, optional=optional, default=field.default, **field.metadata)
