"""Adapter names and their versions: the single writer.

A name points to at most one *current* version; a reload makes a new one, and requests in flight stay on theirs. A
named composition is a ref too, without weights of its own: its parts are resolved anew for every request.
Names are full names (see `access.py`) but where a method says that they come from a client.
Owns names, states and the count of requests per version. Knows nothing of weights, memory or the engine, and is used
from one thread only. `AdapterManager` changes it; every request acquires its adapters here and releases them.

    begin_load → LOADING ─ commit_load → LOADED ─ begin_unload → UNLOADING ─ finish_unload → gone
                                  compose ─┘
                    └─ fail_load → gone      └─ commit_load of its successor → REPLACED ─ finish_unload → gone
"""

from collections.abc import Callable, Iterable

from multilora.engine.messages import AdapterInfo
from multilora.errors import (
    AdapterAlreadyLoaded,
    AdapterError,
    AdapterNotLoaded,
    AdapterQuotaExceeded,
    AdapterUnloading,
    BadRequest,
)
from multilora.front.access import owner_of, shown
from multilora.front.adapter_names import AdapterNames, unknown_adapter
from multilora.front.adapter_ref import AdapterRef, Held, RefState
from multilora.front.adapter_spec import AdapterSpec, show
from multilora.front.versions import (
    DEFAULT_WEIGHT_VERSION,
    VersionLabel,
    check_weight_version,
    newest_label,
)


class AdapterRegistry(AdapterNames):
    """`max_loaded`: how many different adapters one request may name; None: any number.

    weight_version: the label of the base model and of adapters that have none of their own; see `label_weights`.
    max_per_tenant: how many, unless the tenant has its own limit. on_change: is told of each version whose state is
    another one, if requests can see that, and of None after `label_weights`.
    """

    def __init__(
        self, model_name: str, enabled: bool, max_loaded: int | None = None, max_per_tenant: int | None = None
    ):
        super().__init__(model_name, enabled)
        self.max_loaded = max_loaded
        self.max_per_tenant = max_per_tenant
        self.weight_version = DEFAULT_WEIGHT_VERSION
        self._versions: dict[int, AdapterRef] = {}  # every version that is not gone
        self._loading: dict[str, list[AdapterRef]] = {}  # by age; several only if all but the first may replace
        self._next_version = 1
        self.on_change: Callable[[AdapterRef | None], None] = lambda _ref: None

    # loading

    def begin_load(
        self,
        name: str,
        path: str,
        pinned: bool = False,
        *,
        replace: bool = False,
        weight_version: str | None = None,
        version: int | None = None,
    ) -> int:
        """A new version of `name`, invisible until commit_load. With `replace` the name may be loaded already, or be
        loading: of several loads the one that began last stays, whichever ends first. version: an unused number."""
        ref = self._new_ref(name, path, pinned, replace, weight_version, version)
        self._loading.setdefault(name, []).append(ref)
        return ref.version

    def skip_versions(self, next_version: int) -> None:
        """Give no number below `next_version` to what is loaded from now on."""
        self._next_version = max(self._next_version, next_version)

    def label_weights(self, weight_version: str) -> None:
        """Set the server's label. Requests that run keep the one they began with. Raises BadRequest."""
        check_weight_version(weight_version, "new_version")
        self.weight_version = weight_version
        self.on_change(None)

    def compose(
        self, name: str, parts: AdapterSpec, *, replace: bool = False, weight_version: str | None = None
    ) -> int | None:
        """`name` is a composition of loaded adapters from now on, whose names in `parts` come from a client. Returns
        what it replaced, as commit_load does."""
        version = self.begin_compose(name, parts, replace=replace, weight_version=weight_version)
        return self.commit_load(version, None)

    def begin_compose(
        self,
        name: str,
        parts: AdapterSpec,
        *,
        replace: bool = False,
        weight_version: str | None = None,
        version: int | None = None,
    ) -> int:
        """A new version of `name` that is a composition of adapters whose names come from a client, invisible until
        commit_load; its parts stay meanwhile."""
        self._check_enabled(shown(name))
        parts = tuple((self._full_name(part), weight) for part, weight in parts)
        self.check_request([parts])
        for part, _ in parts:
            ref = self._current_part(part)
            if ref.parts:
                raise _nested(part)
            if part == name:
                raise BadRequest(f"composition {shown(name)!r}: is one of its own parts", param="lora_path")
            self._check_composable(ref, _is_sum(parts))
        self._check_unused(name)
        ref = self._new_ref(name, show(parts), False, replace, weight_version, version)
        ref.parts = parts
        self._loading.setdefault(name, []).append(ref)
        return ref.version

    def commit_load(self, version: int, info: AdapterInfo | None) -> int | None:
        """Requests get this version from now on. Returns the version that is replaced, if any, which is this one if a
        later one is current already: the caller unloads it when it is idle and then calls finish_unload."""
        ref = self._versions[version]
        self._end_loading(ref)
        ref.info = info
        return self._make_current(ref)

    def fail_load(self, version: int) -> None:
        """The load failed: as if it had never begun."""
        ref = self._versions[version]
        self._end_loading(ref)
        del self._versions[version]

    # unloading

    def begin_unload(self, name: str) -> int:
        """New requests for `name` are refused from now on; those that hold it finish."""
        current = self._current.get(name)
        if current is None:
            raise AdapterNotLoaded(f"adapter {shown(name)!r} does not exist", param="lora_name")
        if current.state is RefState.UNLOADING:
            raise AdapterUnloading(f"adapter {shown(name)!r} is being unloaded", param="lora_name")
        if name in self._loading:
            what = f"adapter {shown(name)!r} is being replaced"
            raise AdapterError(f"{what}; unload it when that is done", param="lora_name")
        self._check_unused(name)
        self._change(current, RefState.UNLOADING)
        return current.version

    def undo_unload(self, version: int) -> None:
        """The unload that has begun is not to be: requests get the version again."""
        ref = self._versions[version]
        assert ref.state is RefState.UNLOADING
        self._change(ref, RefState.LOADED)

    def finish_unload(self, version: int) -> None:
        """The engine has forgotten the version; its name, if it was the current one, is free again."""
        ref = self._versions[version]
        assert ref.state in (RefState.UNLOADING, RefState.REPLACED)
        assert ref.num_requests == 0
        del self._versions[version]
        if ref.state is RefState.UNLOADING:
            del self._current[ref.name]
        self._change(ref, RefState.GONE)

    # requests

    def acquire(self, spec: AdapterSpec) -> Held:
        """What a new request for `spec` runs on, counted until `release`."""
        names = [self._current_part(name) for name, _ in spec]
        parts = self._expand(spec)
        refs = [self._current_part(name) for name, _ in parts]
        for ref in refs:
            self._check_composable(ref, _is_sum(parts))
        composition = [(e.version, weight) for e, (_, weight) in zip(refs, parts, strict=True) if weight]
        holders = tuple({e.version: e for e in (*names, *refs)}.values())
        for ref in holders:
            ref.num_requests += 1
        return Held(tuple(composition), holders, self.label_of(*holders))

    def label_of(self, *refs: AdapterRef) -> VersionLabel:
        """What answers from these versions say that they come from, if they begin now. None: the base model."""
        return newest_label([(ref.version, ref.weight_version) for ref in refs], self.weight_version)

    def release(self, held: Held) -> None:
        for ref in held.refs:
            self._let_go(ref)

    def switch(self, held: Held, old: int, new: int) -> Held:
        """The request that has `held` goes on with version `new` instead of `old`. Returns what it holds now."""
        if new not in [ref.version for ref in held.refs]:
            self._versions[new].num_requests += 1
        versions = dict.fromkeys(new if ref.version == old else ref.version for ref in held.refs)
        refs = tuple(self._versions[version] for version in versions)
        for ref in held.refs:
            if ref.version == old:
                self._let_go(ref)
        composition = tuple((new if one == old else one, weight) for one, weight in held.composition)
        return Held(composition, refs, self.label_of(*refs))

    def _let_go(self, ref: AdapterRef) -> None:
        assert ref.num_requests > 0
        ref.num_requests -= 1
        if ref.num_requests == 0:
            callbacks, ref.idle_callbacks = ref.idle_callbacks, []
            for callback in callbacks:
                callback()

    def ref(self, version: int) -> AdapterRef:
        """A version that is not gone."""
        return self._versions[version]

    def current(self, name: str) -> AdapterRef | None:
        """What requests for `name` get, perhaps being unloaded; None: it is not loaded."""
        return self._current.get(name)

    def is_loading(self, name: str) -> bool:
        """Whether a version of `name` is being loaded, perhaps to replace the current one."""
        return name in self._loading

    def is_composition(self, version: int) -> bool:
        """It has no weights of its own: the engine does not know it."""
        return bool(self._versions[version].parts)

    def num_requests(self, version: int) -> int:
        """How many requests hold the version."""
        return self._versions[version].num_requests

    def when_idle(self, version: int, callback: Callable[[], None]) -> None:
        """Call `callback` once when no request holds the version any more: at once if none does."""
        ref = self._versions[version]
        if ref.num_requests == 0:
            callback()
        else:
            ref.idle_callbacks.append(callback)

    def check_request(self, specs: Iterable[AdapterSpec]) -> None:
        """Raise BadRequest if one request names more different adapters than `max_loaded`."""
        unique = {name for spec in specs for name, _ in self._expand(spec)}
        if self.max_loaded is not None and len(unique) > self.max_loaded:
            raise BadRequest(
                f"the request names {len(unique)} adapters; --max-loaded-loras is {self.max_loaded}",
                param="lora_path",
            )

    def sole_version(self, spec: AdapterSpec) -> int | None:
        """The version of the one adapter that acts, just as it is; None: the base model, a sum, or an adapter not
        loaded."""
        parts = self._expand(spec)
        ref = self._current.get(parts[0][0]) if parts and not _is_sum(parts) else None
        return None if ref is None else ref.version

    def _new_ref(
        self,
        name: str,
        path: str,
        pinned: bool,
        replace: bool,
        weight_version: str | None,
        version: int | None,
    ) -> AdapterRef:
        self._check_enabled()
        self.check_name(name)
        self._check_room(name)
        check_weight_version(weight_version)
        if name in self._loading and not replace:
            raise AdapterAlreadyLoaded(f"adapter {shown(name)!r} is already loaded or being loaded")
        current = self._current.get(name)
        if current is not None and current.state is RefState.UNLOADING:
            raise AdapterUnloading(f"adapter {shown(name)!r} is being unloaded")
        if current is not None and not replace:
            raise AdapterAlreadyLoaded(f"adapter {shown(name)!r} is already loaded; unload it first")
        ref = AdapterRef(name, path, version or self._next_version, pinned, weight_version)
        assert ref.version not in self._versions
        self.skip_versions(ref.version + 1)
        self._versions[ref.version] = ref
        return ref

    def _check_room(self, name: str) -> None:
        """Raise AdapterQuotaExceeded if the name would be one too many of its tenant's."""
        tenant = owner_of(name)
        if not tenant or name in self.known_names() or name in self._loading:
            return
        own = self.tenants[tenant].max_adapters
        most = self.max_per_tenant if own is None else own
        count = sum(owner_of(other) == tenant for other in {*self.known_names(), *self._loading})
        if most is not None and count >= most:
            raise AdapterQuotaExceeded(f"{count} adapters are loaded, {most} at most: unload one first")

    def _end_loading(self, ref: AdapterRef) -> None:
        assert ref.state is RefState.LOADING
        self._loading[ref.name].remove(ref)
        if not self._loading[ref.name]:
            del self._loading[ref.name]

    def _make_current(self, ref: AdapterRef) -> int | None:
        replaced = self._current.get(ref.name)
        if replaced is not None and replaced.version > ref.version:
            self._change(ref, RefState.REPLACED)
            return ref.version
        self._current[ref.name] = ref
        self._change(ref, RefState.LOADED)
        if replaced is not None:
            self._change(replaced, RefState.REPLACED)
        return replaced.version if replaced else None

    def _change(self, ref: AdapterRef, state: RefState) -> None:
        ref.state = state
        self.on_change(ref)

    def _expand(self, spec: AdapterSpec) -> AdapterSpec:
        """The name of a composition, alone and of weight 1, stands for its parts."""
        refs = [self._current.get(name) for name, _ in spec]
        for ref in refs:
            if ref is not None and ref.parts:
                if len(spec) == 1 and spec[0][1] == 1.0:
                    return ref.parts
                raise _nested(ref.name)
        return spec

    def _current_part(self, name: str) -> AdapterRef:
        """The ref of `name`, which takes requests."""
        ref = self._find(name)
        if ref.state is RefState.UNLOADING:
            raise AdapterUnloading(f"adapter {shown(name)!r} is being unloaded", param="lora_path")
        return ref

    @staticmethod
    def _check_composable(ref: AdapterRef, composed: bool) -> None:
        if composed and ref.info is not None and ref.info.not_composable_reason:
            raise BadRequest(
                f"adapter {shown(ref.name)!r} cannot be composed: {ref.info.not_composable_reason}", param="lora_path"
            )

    def _check_unused(self, name: str) -> None:
        composing = [ref for refs in self._loading.values() for ref in refs]
        users = [shown(e.name) for e in (*self.refs(), *composing) if name in dict(e.parts)]
        if users:
            raise AdapterError(
                f"adapter {shown(name)!r} is part of composition {', '.join(map(repr, users))}: unload that first",
                param="lora_name",
            )

    def _find(self, name: str) -> AdapterRef:
        """The current ref of `name`, perhaps being unloaded."""
        self._check_enabled(name)
        ref = self._current.get(name)
        if ref is None:
            raise unknown_adapter(shown(name))
        return ref

    # listing

    def loaded(self) -> dict[str, str]:
        """Name → path of the adapters that take requests, in load order."""
        return {e.name: e.path for e in self.refs()}

    def versions(self) -> list[AdapterRef]:
        """Every version that requests may run on, or wait for the end of."""
        return [ref for ref in self._versions.values() if ref.state is not RefState.LOADING]

    def refs(self) -> list[AdapterRef]:
        """The adapters that take requests, in load order."""
        return [e for e in self._current.values() if e.state is RefState.LOADED]

    def name_of(self, version: int | None) -> str | None:
        """The name of a version that is not gone yet; None for base and for versions that are gone."""
        ref = None if version is None else self._versions.get(version)
        return ref.name if ref else None


def _nested(name: str) -> BadRequest:
    return BadRequest(f"adapter {shown(name)!r} is a composition itself: name its parts", param="lora_path")


def _is_sum(spec: AdapterSpec) -> bool:
    """More than one adapter, just as it is."""
    return len(spec) > 1 or any(weight != 1.0 for _, weight in spec)
