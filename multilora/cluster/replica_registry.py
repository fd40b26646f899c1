"""The names of one replica: those of the whole cluster, of which it has loaded some.

What it has not loaded is listed, can be unloaded and must not be loaded again, as if it were here; requests find it
loaded, because `local_copies.py` has brought it before they are read.
"""

from collections.abc import Callable, Collection

from multilora.cluster.cluster_table import ClusterTable
from multilora.errors import AdapterAlreadyLoaded
from multilora.front.access import shown
from multilora.front.adapter_ref import AdapterRef, RefState
from multilora.front.records import AdapterRecord
from multilora.front.registry import AdapterRegistry


class ReplicaRegistry(AdapterRegistry):
    """table: the cluster's names, set before the first request. settled: is told of each name whose load has ended,
    and with which version if that is the current one, else 0; left: of each that stands for nothing here any more."""

    def __init__(
        self, model_name: str, enabled: bool, max_loaded: int | None = None, max_per_tenant: int | None = None
    ):
        super().__init__(model_name, enabled, max_loaded, max_per_tenant)
        self.table = ClusterTable()
        self.settled: Callable[[str, int], None] = lambda _name, _version: None
        self.left: Callable[[str], None] = lambda _name: None
        self.bringing = False  # a load of `local_copies.py` begins: it is no client's
        self._replacing: set[int] = set()

    def known_names(self) -> Collection[str]:
        """See `AdapterNames`."""
        return self.table.records.keys()

    def refs(self) -> list[AdapterRef]:
        """See `AdapterRegistry`."""
        here = {ref.name: ref for ref in super().refs()}
        return [here.get(name) or _elsewhere(record) for name, record in self.table.records.items()]

    def replaces(self, version: int) -> bool:
        """Whether the load that makes this version may replace an adapter."""
        return version in self._replacing

    def fail_load(self, version: int) -> None:
        """See `AdapterRegistry`."""
        name = self.ref(version).name
        super().fail_load(version)
        self._replacing.discard(version)
        self.settled(name, 0)

    def _new_ref(
        self, name: str, path: str, pinned: bool, replace: bool, weight_version: str | None, version: int | None
    ) -> AdapterRef:
        if name in self.table.records and not replace and not self.bringing:
            raise AdapterAlreadyLoaded(f"adapter {shown(name)!r} is already loaded; unload it first")
        ref = super()._new_ref(name, path, pinned, replace, weight_version, version)
        if replace:
            self._replacing.add(ref.version)
        return ref

    def _change(self, ref: AdapterRef, state: RefState) -> None:
        super()._change(ref, state)
        if state in (RefState.LOADED, RefState.REPLACED):
            self._replacing.discard(ref.version)
            self.settled(ref.name, ref.version if state is RefState.LOADED else 0)
        elif state is RefState.GONE:
            self.left(ref.name)


def _elsewhere(record: AdapterRecord) -> AdapterRef:
    return AdapterRef(
        record.name,
        record.path,
        record.version,
        record.pinned,
        record.weight_version,
        RefState.LOADED,
        parts=record.parts,
    )
