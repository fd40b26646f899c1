"""The ways to quantise a base model, by the `quant_method` of a checkpoint's config.json and by `--quantization`.

Adding one is a file and a line in the table. `--quantization` finds its choices here, so this file imports no heavy
library.
"""

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from multilora.errors import ConfigError, ModelUnsupported

if TYPE_CHECKING:
    from multilora.layers.weights.plain import WeightFormats


class Method(Protocol):
    """What a file of the table has as `METHOD`."""

    def read(self, config: dict[str, Any]) -> "WeightFormats":
        """The formats of a checkpoint with this quantization_config. Raises ModelUnsupported naming the field."""
        ...

    def quantise(self) -> "WeightFormats":
        """The formats of a checkpoint that is quantised while it is loaded. Raises ConfigError if that cannot be."""
        ...


METHODS = {
    "fp8": "multilora.layers.weights.fp8",
    "compressed-tensors": "multilora.layers.weights.compressed_tensors",
    "awq": "multilora.layers.weights.awq",
    "gptq": "multilora.layers.weights.gptq",
    "bitsandbytes": "multilora.layers.weights.bitsandbytes",
    "mxfp4": "multilora.layers.weights.mxfp4",
}
"""The module of each; its `METHOD` is one."""


def weight_formats(raw: dict[str, Any], asked: str | None) -> "WeightFormats":
    """How a base model holds its linear layers. raw: its config.json; asked: --quantization.

    Raises ModelUnsupported naming a method or field that is not served, ConfigError if checkpoint and option differ.
    """
    from multilora.layers.weights.plain import PLAIN_FORMATS

    config = raw.get("quantization_config") or raw.get("compression_config")
    if config is None:
        return PLAIN_FORMATS if asked is None else _method(asked).quantise()
    found = _name(config)
    if found not in METHODS:
        raise ModelUnsupported(f"quant_method {found!r} is not supported; served: {', '.join(METHODS)}")
    if asked not in (None, found):
        raise ConfigError(f"--quantization {asked}: the checkpoint is already quantised, by {found}")
    return _method(found).read(config)


def _name(config: dict[str, Any]) -> str:
    """The method of a quantization_config; older ones of bitsandbytes do not say it."""
    if not isinstance(config, dict):
        raise ModelUnsupported(f"quantization_config of config.json is {config!r:.80}, expected an object")
    unnamed = "bitsandbytes" if config.get("load_in_4bit") or config.get("load_in_8bit") else "(none)"
    return str(config.get("quant_method") or unnamed)


def _method(name: str) -> Method:
    method: Method = importlib.import_module(METHODS[name]).METHOD
    return method


def not_made(name: str) -> ConfigError:
    """What `--quantization name` is answered where such checkpoints can only be read."""
    return ConfigError(
        f"--quantization {name}: this server reads such checkpoints and makes none; it makes fp8, bitsandbytes"
    )


def check_fields(config: dict[str, Any], known: Iterable[str]) -> None:
    """Raise ModelUnsupported for a field that says something and that nobody would heed."""
    for field, value in config.items():
        if field not in {"quant_method", *known} and value not in (None, False, "", [], {}):
            raise ModelUnsupported(f"quantization_config: {field} = {value!r:.200} is not supported")


def served(config: dict[str, Any], field: str, allowed: tuple[Any, ...]) -> Any:
    """The value of the field, the first of those allowed if there is none. Raises ModelUnsupported for another."""
    value = config.get(field, allowed[0])
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ModelUnsupported(f"quantization_config: {field} = {value!r:.200} is not supported; served: {names}")
    return value
