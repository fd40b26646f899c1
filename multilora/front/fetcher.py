"""Bringing the files of adapters onto this machine, and which places may be asked for them, without I/O.

A path that a client or the operator gives may be a hub repository or a URL; a name that nobody has loaded may be that
of an adapter in one of the places of --lora-resolver-dir, -url and -hub. The engine only ever reads directories.
"""

import fnmatch
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from multilora.adapters.sources import SourceKind, is_path, source_kind
from multilora.adapters.sources.copying import Allowance
from multilora.adapters.sources.download import Stop
from multilora.adapters.sources.files import show
from multilora.adapters.sources.hub import HUB_SCHEME, is_hub_id
from multilora.adapters.sources.inside import copy_adapter
from multilora.adapters.sources.remote import is_below, is_served, is_url
from multilora.adapters.sources.spool import Spool, SpoolShare
from multilora.config import Config
from multilora.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterNotFound,
    AdapterUnavailable,
    StorageFailed,
)
from multilora.front.access import CALLER, Caller, owner_of
from multilora.front.effects import Lane, RunBlocking, Steps
from multilora.front.vocabulary import TOKENIZER_FILES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """An adapter found by its name: where, and the folder of the spool with `nbytes` of its files."""

    path: str
    folder: Path
    nbytes: int


class Fetcher:
    """One per front. `spool` keeps what does not come from a directory or the hub's cache, and owns the downloads."""

    def __init__(self, config: Config, spool: Spool):
        self._config = config
        self._spool = spool

    def localize(self, path: str, version: int, share: SpoolShare, *, any_url: bool) -> Steps[str]:
        """The directory with the files of the adapter at `path`. What had to be copied or downloaded for it belongs
        to `version` in the spool, and is counted in `share`.

        any_url: the operator gives the path; a client's URL must lie below a --lora-resolver-url. The key of
        --api-key alone loads from below --lora-root; that of a tenant from the tenant's directories and, by names
        that it may use, from the resolver's URLs and repositories. Raises AdapterError.
        """
        caller = CALLER.get()
        if caller.tenant.name:
            return (yield from self._localize_for_tenant(path, version, share, caller))
        roots = self._config.lora_root
        directory = (
            is_path(path) or (yield from RunBlocking(Lane.FILES, partial(source_kind, path))) is SourceKind.DIRECTORY
        )
        if directory and not caller.any_path and not roots:
            raise AdapterForbidden(
                f"adapter {show(path)}: with --api-key alone directories are loaded only below a --lora-root"
            )
        if directory:
            return path
        repository = path.removeprefix(HUB_SCHEME)
        if is_url(repository):
            return (yield from self._from_url(path, version, share, any_url=any_url and not roots))
        if caller.any_path and not roots:
            stop = Stop()
            fetch = partial(self._spool.downloads.fetch, path, None, extra=TOKENIZER_FILES, stop=stop)
            fetch = partial(fetch, allowance=self._allowance(None))
            return str((yield from RunBlocking(Lane.HUB, fetch, stop)))
        return (yield from self._from_named_hub(repository, version, share))

    def share(self, name: str) -> SpoolShare:
        """The part of the spool in which an adapter of this full name is kept."""
        tenant, owner = CALLER.get().tenant, owner_of(name)
        own = tenant.spool_bytes if tenant.name == owner else None
        return SpoolShare(owner, self._config.lora_spool_bytes if own is None else own)

    def _localize_for_tenant(self, path: str, version: int, share: SpoolShare, caller: Caller) -> Steps[str]:
        allowance = self._allowance(self._config.lora_resolver_bytes)
        for root in self._tenant_roots(caller):
            copy = partial(copy_adapter, root, _below(root, path), extra=TOKENIZER_FILES, allowance=allowance)
            receive = partial(self._spool.receive, copy)
            folder = yield from RunBlocking(Lane.FILES, receive, undo=self._discard_folder)
            if folder is not None:
                return str(self._spool.keep(folder, version, share))
        repository = path.removeprefix(HUB_SCHEME)
        if is_url(repository):
            names = [path[len(p.rstrip("/")) + 1 :] for p in self._config.lora_resolver_url if is_below(path, p)]
            if not any(map(caller.may_use, names)):
                raise AdapterForbidden(f"adapter {show(path)}: this key may not load from there")
            return (yield from self._from_url(path, version, share, any_url=False))
        if not is_path(path) and is_hub_id(repository) and caller.may_use(repository.partition("@")[0]):
            return (yield from self._from_named_hub(repository, version, share))
        raise AdapterNotFound(f"adapter {show(path)}: there is none among the directories of its tenant")

    def _tenant_roots(self, caller: Caller) -> Iterator[str]:
        if caller.tenant.roots is not None:
            yield from caller.tenant.roots
        else:
            for root in self._config.lora_root:
                yield os.path.join(root, caller.tenant.name)

    def _from_url(self, path: str, version: int, share: SpoolShare, *, any_url: bool) -> Steps[str]:
        if not is_served(path):
            raise AdapterNotFound(f"adapter {show(path)}: not an http(s)://, s3:// or gs:// URL of a directory")
        if not any_url and not any(is_below(path, prefix) for prefix in self._config.lora_resolver_url):
            raise AdapterForbidden(f"adapter {show(path)}: the URL lies below no --lora-resolver-url")
        found = yield from self._download(path, self._allowance(self._config.lora_resolver_bytes))
        return str(self._spool.keep(found.folder, version, share))

    def _from_named_hub(self, repository: str, version: int, share: SpoolShare) -> Steps[str]:
        """Fetch a repository that --lora-resolver-hub names. Not into the hub's cache, which lies below no root."""
        if not self._is_named_hub(repository):
            raise AdapterForbidden(
                f"adapter {show(repository)}: no such directory, and no --lora-resolver-hub has such repositories"
            )
        allowance = self._allowance(self._config.lora_resolver_bytes)
        found = yield from self._download(HUB_SCHEME + repository, allowance)
        return str(self._spool.keep(found.folder, version, share))

    def _is_named_hub(self, name: str) -> bool:
        repository = name.partition("@")[0]
        return is_hub_id(name) and any(fnmatch.fnmatchcase(repository, p) for p in self._config.lora_resolver_hub)

    def find(self, name: str) -> Steps[Found | None]:
        """Look for an adapter in the places of the resolver, one after the other; None: it is in none of them.

        Raises AdapterError if it is there but cannot be fetched. Where it was looked for is only logged.
        """
        allowance = self._allowance(self._config.lora_resolver_bytes)
        for root in self._config.lora_resolver_dir:
            copy = partial(copy_adapter, root, name, extra=TOKENIZER_FILES, allowance=allowance)
            receive = partial(self._spool.receive, copy)
            folder = yield from RunBlocking(Lane.FILES, receive, undo=self._discard_folder)
            if folder is not None:
                return Found(os.path.join(root, name), folder, allowance.nbytes)
        for path in self._remote_places(name):
            try:
                return (yield from self._download(path, allowance))
            except AdapterNotFound as e:
                logger.info("adapter %s: %s", show(name), e)
            except (AdapterIncompatible, StorageFailed):
                raise
            except AdapterError as e:
                logger.warning("adapter %s: %s", show(name), e)
                raise AdapterUnavailable(f"adapter {name!r} cannot be fetched now; try again later") from e
        return None

    def discard(self, found: Found) -> None:
        """Delete the files of an adapter that is not loaded after all."""
        self._spool.discard(found.folder)

    def _remote_places(self, name: str) -> Iterator[str]:
        for prefix in self._config.lora_resolver_url:
            path = f"{prefix.rstrip('/')}/{name}"
            if is_below(path, prefix):
                yield path
        if self._is_named_hub(name):
            yield HUB_SCHEME + name

    def _download(self, path: str, allowance: Allowance) -> Steps[Found]:
        stop = Stop()

        def download(target: Path) -> bool:
            self._spool.downloads.fetch(path, target, extra=TOKENIZER_FILES, allowance=allowance, stop=stop)
            allowance.take(sum(file.stat().st_size for file in target.iterdir()))
            return True

        receive = partial(self._spool.receive, download)
        folder = yield from RunBlocking(_lane_of(path), receive, stop, self._discard_folder)
        assert folder is not None
        return Found(path, folder, allowance.nbytes)

    def _allowance(self, max_bytes: int | None) -> Allowance:
        return Allowance(time.monotonic() + self._config.lora_load_timeout, max_bytes)

    def _discard_folder(self, folder: Path | None) -> None:
        if folder is not None:
            self._spool.discard(folder)


def _lane_of(path: str) -> Lane:
    """Who waits for a host that does not answer: what comes by the same scheme."""
    scheme = path.partition("://")[0]
    return {"s3": Lane.S3, "gs": Lane.GS, "http": Lane.HTTP, "https": Lane.HTTP}.get(scheme, Lane.HUB)


def _below(root: str, path: str) -> str:
    """The path from `root` on, where it begins with that; else as it is: `copy_adapter` refuses what is no name."""
    prefix = os.path.join(root, "")
    return path.removeprefix(prefix)
