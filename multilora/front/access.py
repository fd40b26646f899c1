"""Who a request comes from, and what that key may do with which adapters.

The server finds the `Caller` of a request's key and sets `CALLER` for the request's task; whatever the request starts
inherits it. Without keys, in `LLM` and at start, the caller is `OPERATOR`, who may do everything.

Each tenant has adapter names of its own. The registry keeps the adapter that tenant acme calls "sql" under the full
name "acme:sql"; the operator's adapters, which all tenants may share, have plain names. No adapter name of a client
has a colon, so no tenant can name another's adapter, or learn that there is one. Knows neither HTTP nor secrets.
"""

import contextlib
import fnmatch
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

SEPARATOR = ":"


@dataclass(frozen=True)
class Limits:
    """What a key, or all requests for one adapter, may take. None: any number."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


@dataclass(frozen=True)
class Tenant:
    """What all keys of one tenant share. "" is the operator, and whoever uses a server without tenants.

    max_adapters: how many it may have loaded; spool_bytes: how much disk space they may take, both None: the server's
    default. roots: where the directories lie that its keys may load, None: below --lora-root, in a directory of the
    tenant's name.
    """

    name: str = ""
    max_adapters: int | None = None
    spool_bytes: int | None = None
    roots: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A key, by its id. use, see, load: patterns of adapter names, as of files; see None: as use.

    admin: may do everything, with the adapters of all tenants. pin: may keep adapters from being evicted. any_path:
    loads are bound by --lora-root alone.
    """

    key_id: str
    tenant: Tenant = Tenant()
    admin: bool = False
    use: tuple[str, ...] = ("*",)
    see: tuple[str, ...] | None = None
    load: tuple[str, ...] = ()
    pin: bool = False
    any_path: bool = False
    limits: Limits = Limits()

    def may_use(self, name: str) -> bool:
        """Whether requests may name an adapter so."""
        return self.admin or (SEPARATOR not in name and _matches(name, self.use))

    def may_load(self, name: str) -> bool:
        """Whether the key may load, replace and unload an adapter of this name."""
        return self.admin or _matches(name, self.load)

    def own_name(self, name: str) -> str:
        """The full name of the tenant's own adapter that it calls `name`."""
        return f"{self.tenant.name}{SEPARATOR}{name}" if self.tenant.name else name

    def owns(self, full_name: str) -> bool:
        """Whether the adapter is the tenant's own, and no other's."""
        return owner_of(full_name) == self.tenant.name

    def shown(self, full_name: str) -> str:
        """The caller's word for an adapter."""
        return full_name.removeprefix(self.own_name("")) if self.tenant.name else full_name

    def sees(self, full_name: str) -> bool:
        """Whether lists show the adapter."""
        if self.admin:
            return True
        shown = self.shown(full_name)
        return SEPARATOR not in shown and _matches(shown, self.use if self.see is None else self.see)


OPERATOR = Caller(key_id="", admin=True, load=("*",), pin=True, any_path=True)
NOBODY = Caller(key_id="")
"""Who has sent no key where none is asked for."""

CALLER: ContextVar[Caller] = ContextVar("caller", default=OPERATOR)


@contextlib.contextmanager
def acting_for(tenant: Tenant) -> Iterator[None]:
    """Within this, the operator does for a tenant what no key could do better."""
    token = CALLER.set(Caller(key_id="", tenant=tenant, load=("*",), pin=True))
    try:
        yield
    finally:
        CALLER.reset(token)


def owner_of(full_name: str) -> str:
    """The name of the tenant whose adapter it is; "": the operator's."""
    return full_name.rpartition(SEPARATOR)[0]


def shown(full_name: str) -> str:
    """The present caller's word for an adapter."""
    return CALLER.get().shown(full_name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
