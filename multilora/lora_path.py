"""The adapters that a server or LLM loads at its start, in the forms in which they can be given."""

import json
from dataclasses import dataclass
from types import NoneType
from typing import Any

from multilora.errors import ConfigError


@dataclass(frozen=True)
class LoraPath:
    """One entry of --lora-paths."""

    lora_name: str
    lora_path: str
    pinned: bool = False

    @classmethod
    def parse(cls, value: "str | dict[str, Any] | LoraPath") -> "LoraPath":
        """`PATH`, `NAME=PATH` (split at the first `=`), a JSON object, or a dict. Raises ConfigError."""
        if isinstance(value, LoraPath):
            return value
        if isinstance(value, str):
            value = _read_lora_path(value.strip())
        if not isinstance(value, dict):
            raise ConfigError(f"--lora-paths: {value!r}: expected PATH, NAME=PATH or a JSON object")
        unknown = set(value) - {"lora_name", "lora_path", "pinned"}
        if unknown:
            raise ConfigError(f"--lora-paths: unknown field {sorted(unknown)[0]!r}")
        name, path, pinned = value.get("lora_name"), value.get("lora_path"), value.get("pinned", False)
        if not (isinstance(name, str) and isinstance(path, str) and isinstance(pinned, bool) and name and path):
            raise ConfigError('--lora-paths: expected {"lora_name": str, "lora_path": str, "pinned": bool}')
        return cls(name, path, pinned)


def _read_lora_path(text: str) -> Any:
    if text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as e:
            raise ConfigError(f"--lora-paths: {text!r} is not valid JSON: {e}") from None
    name, eq, path = text.partition("=")
    if not name or (eq and not path):
        raise ConfigError(f"--lora-paths: {text!r}: expected PATH, NAME=PATH or a JSON object")
    return {"lora_name": name, "lora_path": path if eq else name}


def read_lora_paths(value: Any) -> tuple[LoraPath, ...]:
    """`--lora-paths` as a list of its forms, one of them, or a dict of name and path. Raises ConfigError."""
    if isinstance(value, dict):
        value = [LoraPath(name, path) for name, path in value.items()]
    elif isinstance(value, str):
        value = [value]
    elif not isinstance(value, list | tuple | NoneType):
        raise ConfigError(f"--lora-paths: {value!r}: expected a list")
    return tuple(LoraPath.parse(path) for path in value or ())
