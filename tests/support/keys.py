"""Servers with a file of keys, for tests: keys by short names, two tenants and an admin."""

from pathlib import Path
from typing import Any

from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer

from multilora.server.key_hash import write_hash

SALT = bytes(16)
BOTH_TENANTS = """
[keys.acme]
tenant = "acme"
load = ["*"]

[keys.zorg]
tenant = "zorg"
load = ["*"]

[keys.ops]
admin = true
"""


def key_of(name: str) -> str:
    """The key of `[keys.NAME]` in a file that `write_keys` has written."""
    return f"ml-{name}-0123456789abcdefghij"


def write_keys(path: Path, text: str = BOTH_TENANTS) -> str:
    """Write `text` to a file, with the hash of each key put in. Returns its path."""
    lines = []
    for line in text.splitlines():
        lines.append(line)
        if line.startswith("[keys."):
            name = line.removeprefix("[keys.").removesuffix("]")
            lines.append(f'hash = "{write_hash(key_of(name), SALT)}"')
    path.write_text("\n".join(lines))
    return str(path)


class KeyedServer(LocalServer):
    """A LocalServer with a file of keys in `folder`; `get`, `post` and `send` take `key`, the name of one."""

    def __init__(
        self, folder: Path, text: str = BOTH_TENANTS, *, client: Any = None, tokenizer: Any = None, **config: Any
    ):
        self.path = folder / "keys.toml"
        super().__init__(client or FakeEngineClient(), tokenizer, auth_file=write_keys(self.path, text), **config)

    def connect(self, method: str, path: str, body: Any = None, *, key: str | None = None, **headers: str) -> Any:
        if key is not None:
            headers["authorization"] = f"Bearer {key_of(key)}"
        return super().connect(method, path, body, **headers)
