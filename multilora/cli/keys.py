"""API keys from where other users of the machine do not see them: a file, or the environment."""

import os
from typing import Any

from multilora.errors import ConfigError

_KEYS = ("api_key", "admin_api_key", "ssl_keyfile_password")
_PREFIX = "MULTILORA_"


def add_keys(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `serve`, with each key that has no flag taken from its file, or else from the environment.

    A variable that is set but empty counts: `Config` refuses it. Raises ConfigError.
    """
    found = dict(options)
    for name in _KEYS:
        path = found.get(f"{name}_file")
        if path is not None and name in found:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} and --{flag}-file: only one of them can be given")
        if path is not None:
            found[name] = _read(name, path)
        elif name not in found and _PREFIX + name.upper() in os.environ:
            found[name] = os.environ[_PREFIX + name.upper()]
    return found


def _read(name: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text"
        raise ConfigError(f"--{name.replace('_', '-')}-file {path}: {reason}") from None
