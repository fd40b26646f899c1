"""The file of --auth-file: which keys there are, whose they are and what they may do.

    [tenants.acme]                              optional; see `front.access.Tenant`
    max_adapters = 20
    spool_bytes = "8GiB"
    roots = ["/srv/adapters/acme"]

    [keys.acme-web]
    hash = "blake2b:…:…"                        from `multilora keys add` or `multilora keys hash`
    tenant = "acme"
    use = ["*"]                                 and see, load: patterns of names; see `front.access.Caller`
    requests_per_minute = 600                   and tokens_per_minute, concurrency

    [keys.ops]
    hash = "blake2b:…:…"
    admin = true

    [adapters."sql-*"]                          limits for all requests for one adapter of such a name
    concurrency = 8

Everything is checked before anything is used; no message holds a hash. Called by `key_ring.py` and
`cli/key_commands.py`.
"""

import hmac
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multilora.errors import ConfigError
from multilora.front.access import Caller, Limits, Tenant
from multilora.options import parse_size
from multilora.server.key_hash import digest, read_hash

MAX_BYTES = 4 << 20
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")
_PATTERNS = ("use", "see", "load")
_TENANT_FIELDS = frozenset({"max_adapters", "spool_bytes", "roots"})
_KEY_FIELDS = frozenset({"hash", "tenant", "admin", "pin", *_PATTERNS, *_LIMITS})


@dataclass(frozen=True)
class KeyFile:
    """salts: salt → digest → caller. adapters: the limits of an adapter are those of the first pattern that its full
    name matches."""

    salts: Mapping[bytes, Mapping[bytes, Caller]]
    tenants: Mapping[str, Tenant]
    adapters: tuple[tuple[str, Limits], ...]

    def caller(self, key: str) -> Caller | None:
        """Whose key it is; None: nobody's. It takes as long for each key that somebody has."""
        found = None
        for salt, callers in self.salts.items():
            given = digest(key, salt)
            for known, caller in callers.items():
                if hmac.compare_digest(known, given):
                    found = caller
        return found


def read_key_file(path: str) -> KeyFile:
    """Read and check the file. Raises ConfigError naming what is wrong."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"--auth-file {path}: over {MAX_BYTES} bytes")
        return parse_key_file(data.decode("utf-8"))
    except OSError as e:
        raise ConfigError(f"--auth-file {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--auth-file {path}: not UTF-8") from None
    except ConfigError as e:
        raise ConfigError(e.message if "--auth-file" in e.message else f"--auth-file {path}: {e.message}") from None


def parse_key_file(text: str) -> KeyFile:
    """The keys in TOML `text`. Raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"not valid TOML: {e}") from None
    tables = {name: _tables(document, name) for name in ("keys", "tenants", "adapters")}
    if unknown := document.keys() - tables.keys():
        raise ConfigError(f"{sorted(unknown)[0]!r}: expected the tables keys, tenants and adapters")
    if not tables["keys"]:
        raise ConfigError("no keys: [keys.NAME] is missing")
    tenants = {name: _tenant(name, table) for name, table in tables["tenants"].items()}
    salts: dict[bytes, dict[bytes, Caller]] = {}
    for key_id, table in tables["keys"].items():
        caller, salt, hashed = _key(key_id, table, tenants)
        if hashed in salts.setdefault(salt, {}):
            raise ConfigError(f"keys.{key_id}: the same key as keys.{salts[salt][hashed].key_id}")
        salts[salt][hashed] = caller
    limits = tuple((pattern, _adapter(pattern, table)) for pattern, table in tables["adapters"].items())
    return KeyFile(salts, tenants, limits)


def _tables(document: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    found = document.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        raise ConfigError(f"{name}: expected tables [{name}.NAME]")
    return found


def _tenant(name: str, table: dict[str, Any]) -> Tenant:
    where = f"tenants.{name}"
    _check(where, name, table, _TENANT_FIELDS)
    size = table.get("spool_bytes")
    if isinstance(size, str):
        try:
            size = parse_size(size)
        except ConfigError as e:
            raise ConfigError(f"{where}.spool_bytes: {e.message}") from None
    roots = _texts(where, table, "roots")
    return Tenant(name, _count(where, table, "max_adapters"), _positive(f"{where}.spool_bytes", size), roots)


def _key(key_id: str, table: dict[str, Any], tenants: dict[str, Tenant]) -> tuple[Caller, bytes, bytes]:
    """The caller, with the salt and the digest of its key."""
    where = f"keys.{key_id}"
    _check(where, key_id, table, _KEY_FIELDS)
    parsed = read_hash(table["hash"]) if isinstance(table.get("hash"), str) else None
    if parsed is None:
        raise ConfigError(f"{where}.hash: expected the text that `multilora keys hash` writes")
    admin, limits = _flag(where, table, "admin"), _limits(where, table)
    if admin:
        if others := table.keys() - {"hash", "admin", *_LIMITS}:
            raise ConfigError(f"{where}.{sorted(others)[0]}: not for an admin's key, which may do everything")
        return Caller(key_id=key_id, admin=True, load=("*",), pin=True, any_path=True, limits=limits), *parsed
    name = table.get("tenant")
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise ConfigError(f"{where}.tenant: the name of a tenant is required, or admin = true")
    tenant = tenants.setdefault(name, Tenant(name))
    patterns = {field: _texts(where, table, field) for field in _PATTERNS}
    given: dict[str, Any] = {field: found for field, found in patterns.items() if found is not None}
    return Caller(key_id=key_id, tenant=tenant, pin=_flag(where, table, "pin"), limits=limits, **given), *parsed


def _adapter(pattern: str, table: dict[str, Any]) -> Limits:
    where = f'adapters."{pattern}"'
    if unknown := table.keys() - set(_LIMITS):
        raise ConfigError(f"{where}.{sorted(unknown)[0]}: unknown; expected {', '.join(_LIMITS)}")
    return _limits(where, table)


def _limits(where: str, table: dict[str, Any]) -> Limits:
    return Limits(**{field: _count(where, table, field) for field in _LIMITS})


def _check(where: str, name: str, table: dict[str, Any], fields: frozenset[str]) -> None:
    if not _ID.fullmatch(name):
        raise ConfigError(f"{where}: a name has 1 to 64 letters, digits and ._-")
    if unknown := table.keys() - fields:
        raise ConfigError(f"{where}.{sorted(unknown)[0]}: unknown; expected {', '.join(sorted(fields))}")


def _count(where: str, table: dict[str, Any], field: str) -> int | None:
    return _positive(f"{where}.{field}", table.get(field))


def _positive(where: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{where}: expected a positive integer")
    return value


def _flag(where: str, table: dict[str, Any], field: str) -> bool:
    value = table.get(field, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{where}.{field}: expected true or false")
    return value


def _texts(where: str, table: dict[str, Any], field: str) -> tuple[str, ...] | None:
    value = table.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ConfigError(f"{where}.{field}: expected a list of texts")
    return tuple(value)
