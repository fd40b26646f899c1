"""Loading, replacing, composing and unloading adapters while requests run, without I/O.

One `AdapterManager` keeps registry, vocabularies, spool and engine in step through each change: what fails halfway
leaves none of them changed. Names come from clients: each is one of the caller's own. A change is work for a driver
(see `effects.py`), which carries through what has begun.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from multilora.adapters.sources.files import show as show_path
from multilora.adapters.sources.spool import TENSOR_ROOT, Spool
from multilora.engine.messages import AdapterInfo, ReplaceAdapter
from multilora.errors import AdapterError, AdapterUnavailable, BadRequest, Forbidden, MultiloraError
from multilora.front.access import CALLER
from multilora.front.access import shown as shown_name
from multilora.front.adapter_spec import parse_composition, show
from multilora.front.effects import (
    CarryThrough,
    EngineCall,
    EngineLoad,
    EngineUnload,
    Gather,
    Lane,
    RunBlocking,
    Spawn,
    Steps,
    WaitUntilIdle,
    Within,
)
from multilora.front.fetcher import Fetcher, Found
from multilora.front.observer import Observer
from multilora.front.records import AdapterRecord, Records
from multilora.front.registry import AdapterRegistry
from multilora.front.versions import check_weight_version
from multilora.front.vocabulary import Vocabularies
from multilora.lora_path import LoraPath

logger = logging.getLogger(__name__)

MAX_LOADS = 8  # at a time, of one `load_many`


class AdapterManager:
    """One per front. `spool`: where adapters are kept that do not come from a directory or the hub. records: what is
    written down before a change is answered. load_seconds: how long one load may take."""

    def __init__(
        self,
        registry: AdapterRegistry,
        vocabularies: Vocabularies,
        spool: Spool,
        fetcher: Fetcher,
        observer: Observer,
        records: Records,
        load_seconds: float,
    ):
        self._registry = registry
        self._vocabularies = vocabularies
        self.spool = spool
        self._fetcher = fetcher
        self._observer = observer
        self._records = records
        self._load_seconds = load_seconds

    def load(
        self,
        name: str,
        path: str,
        *,
        pinned: bool | None = None,
        replace: bool = False,
        weight_version: str | None = None,
        allow_update_mid_request: bool = False,
        any_url: bool = False,
    ) -> Steps[AdapterInfo]:
        """Load the adapter in a directory, in a hub repository or at a URL, and let requests use it. Raises
        AdapterError. any_url: a URL need not lie below a --lora-resolver-url.

        With `replace` the name may be taken: requests in flight keep the old version, which is unloaded when they
        end, or with `allow_update_mid_request` go on with the new one, from the next step on. `pinned` None: as the
        replaced one, else no. weight_version: see `versions.py`.
        """
        name, pinned = self._own(name, pinned)
        version = self._registry.begin_load(name, path, pinned, replace=replace, weight_version=weight_version)
        info = yield from self._fetch(name, version, path, pinned, any_url)
        yield from CarryThrough(self._commit(name, info, update=allow_update_mid_request))
        return info

    def load_tensors(
        self,
        name: str,
        config: dict[str, Any],
        write: Callable[[Path], None],
        *,
        pinned: bool | None = None,
        replace: bool = False,
        weight_version: str | None = None,
        allow_update_mid_request: bool = False,
    ) -> Steps[AdapterInfo]:
        """Load an adapter whose adapter_config.json is `config` and whose .safetensors file `write(path)` writes. The
        rest is as in `load`."""
        name, pinned = self._own(name, pinned)
        version = self._registry.begin_load(name, TENSOR_ROOT, pinned, replace=replace, weight_version=weight_version)
        with self._undone_on_error(version, TENSOR_ROOT):
            add = partial(self.spool.add, version, config, write, self._fetcher.share(name))
            path = str((yield from RunBlocking(Lane.TENSORS, add, undo=lambda _path: self.spool.remove(version))))
            info = yield from self._in_time(shown_name(name), self._bring(version, path, pinned, None))
        yield from CarryThrough(self._commit(name, info, update=allow_update_mid_request))
        return info

    def load_found(self, name: str, found: Found) -> Steps[AdapterInfo]:
        """Load the adapter that the fetcher has found, which takes its folder. Errors call it by its name."""
        try:
            version = self._registry.begin_load(name, found.path)
        except BaseException:
            self._fetcher.discard(found)
            raise
        with self._undone_on_error(version, name):
            path = str(self.spool.keep(found.folder, version))
            info = yield from self._in_time(name, self._bring(version, path, False, path))
        yield from self._commit(name, info, recorded=False)
        return info

    def load_many(
        self, paths: Sequence[LoraPath], *, all_or_none: bool = False, recorded: bool = True
    ) -> Steps[list[AdapterInfo]]:
        """Load several side by side, which the operator names; requests can use them once all have ended. Raises the
        first error. recorded: they outlast the server, where it has --state-dir.

        Those without an error are loaded then, or none of them with `all_or_none`: no load begins any more there
        once one has failed.
        """
        failed = False

        def fetch(entry: LoraPath) -> Steps[AdapterInfo]:
            nonlocal failed
            if failed and all_or_none:
                raise AdapterError(f"adapter {entry.lora_name!r} is not loaded: another one failed before")
            try:
                version = self._registry.begin_load(entry.lora_name, entry.lora_path, entry.pinned)
                return (yield from self._fetch(entry.lora_name, version, entry.lora_path, entry.pinned, any_url=True))
            except BaseException:
                failed = True
                raise

        found = yield from Gather([fetch(entry) for entry in paths], MAX_LOADS)
        errors = [error for error in found if isinstance(error, BaseException)]
        infos = [
            (entry.lora_name, info) for entry, info in zip(paths, found, strict=True) if isinstance(info, AdapterInfo)
        ]
        for name, info in infos:
            if errors and all_or_none:
                self._registry.fail_load(info.version)
                yield from EngineUnload(info.version)
            else:
                yield from self._commit(name, info, recorded=recorded)
        if errors:
            raise errors[0]
        return [info for _, info in infos]

    def compose(
        self,
        name: str,
        parts: Sequence[Any],
        *,
        pinned: bool | None = None,
        replace: bool = False,
        weight_version: str | None = None,
    ) -> Steps[None]:
        """Let `name` stand for a composition of loaded adapters, each a {name, weight}."""
        name = _own_name(name)
        if pinned:
            raise BadRequest("pinned: a composition has no weights of its own; pin its parts", param="pinned")
        spec = parse_composition(list(parts))
        version = self._registry.begin_compose(name, spec, replace=replace, weight_version=weight_version)
        try:
            yield from self._write(partial(self._records.save, AdapterRecord.of(self._registry.ref(version))))
        except BaseException:
            self._registry.fail_load(version)
            raise
        replaced = self._registry.commit_load(version, None)
        logger.info("adapter %r is now %s", name, show(spec))
        if replaced is not None:
            yield from Spawn(self.drop(replaced))

    def unload(self, name: str) -> Steps[None]:
        """Refuse new requests for `name`, wait for those it has, and free it. Raises AdapterNotLoaded."""
        yield from self._unload(_own_name(name))

    def unload_resolved(self, name: str) -> Steps[None]:
        """The same for one that the resolver has loaded, whoever's request needs the room."""
        yield from self._unload(name)

    def _unload(self, name: str) -> Steps[None]:
        if (
            name in self._records.names
            and self._registry.current(name) is None
            and not self._registry.is_loading(name)
        ):
            yield from self._write(partial(self._records.remove, name))  # it could not be restored
            return
        version = self._registry.begin_unload(name)
        try:
            yield from self._write(partial(self._records.remove, name))
        except BaseException:
            self._registry.undo_unload(version)
            raise
        yield from self.drop(version)
        self._observer.forget(name)
        logger.info("adapter %r unloaded", name)

    def label_weights(self, weight_version: str) -> Steps[None]:
        """Set the server's label of its weights, see `versions.py`. Raises BadRequest."""
        check_weight_version(weight_version, "new_version")
        yield from self._write(partial(self._records.label_weights, weight_version))
        self._registry.label_weights(weight_version)

    def localize(self, path: str, version: int) -> Steps[str]:
        """The directory with the files of an adapter that was loaded before. Raises AdapterError."""
        share = self._fetcher.share(self._registry.ref(version).name)
        return (yield from self._fetcher.localize(path, version, share, any_url=True))

    def _own(self, name: str, pinned: bool | None) -> tuple[str, bool]:
        """The full name of what the caller wants to load, and whether it is to be pinned: None: as the adapter of
        this name is now. Raises Forbidden."""
        name = _own_name(name)
        if pinned and not CALLER.get().pin:
            raise Forbidden("pinned: this key may not pin adapters", param="pinned")
        if pinned is not None:
            return name, pinned
        return name, any(ref.name == name and ref.pinned for ref in self._registry.refs())

    def _fetch(self, name: str, version: int, path: str, pinned: bool, any_url: bool) -> Steps[AdapterInfo]:
        """Into the engine, and its tokens to the front; if that fails, it is as if the load had never begun."""
        share = self._fetcher.share(name)

        def load() -> Steps[AdapterInfo]:
            local = yield from self._fetcher.localize(path, version, share, any_url=any_url)
            return (yield from self._bring(version, local, pinned, local))

        with self._undone_on_error(version, path):
            return (yield from self._in_time(path, load()))

    def _bring(self, version: int, path: str, pinned: bool, tokens_path: str | None) -> Steps[AdapterInfo]:
        """From a directory into the engine, and its tokens to the front."""
        info = yield from EngineLoad(version, path, pinned)
        yield from self.add_tokens(info, tokens_path)
        return info

    def _in_time(self, shown: str, load: Steps[AdapterInfo]) -> Within[AdapterInfo]:
        late = f"adapter {show_path(shown)} was not loaded within {self._load_seconds} s (--lora-load-timeout)"
        return Within(load, self._load_seconds, AdapterUnavailable(late))

    @contextlib.contextmanager
    def _undone_on_error(self, version: int, shown: str) -> Iterator[None]:
        """On an error it is as if the load had never begun. What the error says of the version's folder in the spool,
        it says of `shown` then."""
        try:
            yield
        except BaseException as e:
            self._registry.fail_load(version)
            folder = self.spool.remove(version)
            if isinstance(e, MultiloraError) and folder:
                e.message = e.message.replace(folder, shown)
                e.args = (e.message,)
            raise

    def add_tokens(self, info: AdapterInfo, path: str | None) -> Steps[None]:
        """The last step of a load that went well so far: if it fails, the engine forgets the adapter."""
        if not self._vocabularies.concerns(info):
            return
        try:
            yield from RunBlocking(Lane.FILES, partial(self._vocabularies.add, info, path))
        except BaseException:
            yield from CarryThrough(_unload(info.version))
            raise

    def forget_tokens(self, version: int) -> None:
        """The version is not loaded after all."""
        self._vocabularies.remove(version)

    def _write(self, change: Callable[[], None]) -> Steps[None]:
        """Have a change on the disk before it is answered, where there are records. Raises StorageFailed."""
        if self._records.durable:
            yield from RunBlocking(Lane.STATE, change)

    def _commit(self, name: str, info: AdapterInfo, *, recorded: bool = True, update: bool = False) -> Steps[None]:
        """update: requests on the version that is replaced go on with the new one."""
        if recorded:
            yield from self._record(info)
        replaced = self._registry.commit_load(info.version, info)
        logger.info("adapter %r loaded: rank %d, %d bytes, %s", name, info.rank, info.nbytes, info.path)
        if replaced is None:
            return
        newer = replaced != info.version and not self._registry.is_composition(replaced)
        if update and newer:
            yield from EngineCall(lambda call: ReplaceAdapter(call, replaced, info.version))
        yield from Spawn(self.drop(replaced))

    def _record(self, info: AdapterInfo) -> Steps[None]:
        record = AdapterRecord.of(self._registry.ref(info.version), info.path, info.fingerprint)
        try:
            yield from self._write(partial(self._records.save, record))
        except BaseException:
            self._registry.fail_load(info.version)
            self._vocabularies.remove(info.version)
            yield from EngineUnload(info.version)
            self.spool.remove(info.version)
            raise

    def drop(self, version: int) -> Steps[None]:
        """Wait until no request holds the version, which is being unloaded or was replaced, then free it."""
        yield from WaitUntilIdle(version)
        try:
            if not self._registry.is_composition(version):
                yield from EngineUnload(version)  # which waits for those that have gone on with it meanwhile
            yield from WaitUntilIdle(version)
        finally:
            self._registry.finish_unload(version)
            self.spool.remove(version)
            self._vocabularies.remove(version)


def _unload(version: int) -> Steps[None]:
    yield from EngineUnload(version)


def _own_name(name: str) -> str:
    """The full name of the caller's own adapter, which it may change. Raises Forbidden."""
    caller = CALLER.get()
    if not caller.may_load(name):
        raise Forbidden(f"adapter {name!r:.100}: this key may not load adapters of such names", param="lora_name")
    return caller.own_name(name)
