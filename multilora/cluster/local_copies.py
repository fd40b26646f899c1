"""What a replica has loaded of the cluster's adapters, and that no request goes past what the registry has said.

Every request holds its adapters here before it is read (`server/resolving.py`). A name whose version here is not the
table's is brought first: it was never here, was replaced, or is being replaced by a load of this very replica. A
replica that has not heard of the registry for a lease serves no adapter. `apply` takes in what the registry says.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from multilora.cluster.cluster_table import ClusterTable, TableChange
from multilora.cluster.replica_registry import ReplicaRegistry
from multilora.cluster.shared_records import SharedRecords
from multilora.errors import AdapterUnavailable, AdapterUnloading, MultiloraError, from_wire
from multilora.front.access import CALLER, OPERATOR, shown
from multilora.front.adapter_manager import AdapterManager
from multilora.front.adapter_ref import Held, RefState
from multilora.front.effects import CarryThrough, EngineUnload, Flight, Spawn, Steps, WaitUntilDone
from multilora.front.records import AdapterRecord
from multilora.front.restoring import as_its_tenant, fetch_again

logger = logging.getLogger(__name__)

MOST_TURNS = 8
"""How often a name may change while a request waits for it."""


class LocalCopies:
    """See `AdapterHolder`. lease: seconds; heard: when the question was asked that the registry answered last."""

    active = True

    def __init__(
        self,
        registry: ReplicaRegistry,
        manager: AdapterManager,
        load_seconds: float,
        lease: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._registry, self._manager, self._clock = registry, manager, clock
        self._load_seconds, self._lease = load_seconds, lease
        self.records: SharedRecords | None = None  # set before the first request
        self.heard = clock()
        self._here: dict[str, int] = {}  # the cluster's version of what is loaded here
        self._flights: dict[str, Flight] = {}
        self._leaving: dict[str, Flight] = {}
        registry.settled, registry.left = self._settled, self._left

    # ------------------------------------------------------------------ requests

    def hold(self, names: Iterable[str]) -> Steps[Sequence[Held]]:
        """Bring what is not here as the table has it. Raises the error of what cannot be brought, AdapterUnavailable
        while the registry is not heard of."""
        for name in names:
            self._check_lease()
            yield from self._ensure(name)
        return ()

    def release(self, held: Sequence[Held]) -> None:
        """See `AdapterHolder`: nothing that is here is unloaded for room."""

    def version_here(self, name: str) -> int:
        """The cluster's version of what is loaded here under a name; 0: nothing is."""
        return self._here.get(name, 0)

    def _check_lease(self) -> None:
        if self._clock() - self.heard > self._lease:
            raise AdapterUnavailable("this replica has lost touch with the cluster's registry; try again elsewhere")

    def _ensure(self, name: str) -> Steps[None]:
        for _ in range(MOST_TURNS):
            record = self.table.records.get(name)
            if record is None:
                if self._registry.current(name) is not None:
                    raise AdapterUnloading(f"adapter {shown(name)!r} is being unloaded", param="lora_path")
                return
            for part, _weight in record.parts:
                yield from self._ensure(part)
            if self._here.get(name) == record.version:
                return
            flight = self._saving(name) or (yield from self._board(record))
            yield from WaitUntilDone(flight, self._load_seconds)
            if not flight.done:
                raise AdapterUnavailable(f"adapter {shown(name)!r} is still being loaded; try again later")
            if flight.error is not None:
                raise from_wire(flight.error.kind, flight.error.message)
        raise AdapterUnavailable(f"adapter {shown(name)!r} is being replaced over and over; try again later")

    @property
    def table(self) -> ClusterTable:
        """The names of the cluster, as this replica knows them."""
        return self._registry.table

    def _saving(self, name: str) -> Flight | None:
        """A change of this replica's own, which the registry knows already."""
        return None if self.records is None else self.records.saving.get(name)

    # ------------------------------------------------------------------ loads

    def _board(self, record: AdapterRecord) -> Steps[Flight]:
        flight = self._flights.get(record.name)
        if flight is None:
            flight = self._flights[record.name] = Flight()
            yield from Spawn(self._fly(record, flight))
        return flight

    def _fly(self, record: AdapterRecord, flight: Flight) -> Steps[None]:
        CALLER.set(OPERATOR)  # of this task: whoever asks for it, it is brought as it was loaded
        try:
            yield from self._wait_for_its_predecessor(record.name)
            yield from CarryThrough(self._bring(record))
        except MultiloraError as e:
            flight.error = e
            logger.warning("adapter %r of the cluster cannot be loaded here: %s", record.name, e)
        except BaseException:
            flight.error = AdapterUnavailable(f"adapter {record.name!r} could not be loaded here")
            raise
        finally:
            del self._flights[record.name]
            flight.finish()

    def _bring(self, record: AdapterRecord) -> Steps[None]:
        registry = self._registry
        if record.parts:
            registry.bringing = True
            try:
                composed = registry.compose(
                    record.name, record.parts, replace=True, weight_version=record.weight_version
                )
            finally:
                registry.bringing = False
            self._here[record.name] = record.version
            if composed is not None:
                yield from Spawn(self._manager.drop(composed))
            return
        options = {"replace": True, "weight_version": record.weight_version}
        version = registry.begin_load(record.name, record.path, record.pinned, **options)  # type: ignore[arg-type]
        try:
            fetch = fetch_again(self._manager, dataclasses.replace(record, version=version))
            info = yield from as_its_tenant(registry, record, fetch)
            if record.fingerprint and record.is_of_other_files(info.fingerprint):
                self._manager.forget_tokens(version)
                yield from EngineUnload(version)
                raise AdapterUnavailable(f"adapter {record.name!r}: its files have changed since: load it again")
        except BaseException:
            registry.fail_load(version)
            raise
        replaced = registry.commit_load(version, info)
        self._here[record.name] = record.version
        if replaced is not None:
            yield from Spawn(self._manager.drop(replaced))

    def _wait_for_its_predecessor(self, name: str) -> Steps[None]:
        """An adapter of this name is being unloaded here, and its last requests run."""
        while (current := self._registry.current(name)) is not None and current.state is RefState.UNLOADING:
            flight = self._leaving.setdefault(name, Flight())
            yield from WaitUntilDone(flight, self._load_seconds)
            if not flight.done:
                raise AdapterUnavailable(f"adapter {name!r} is still being unloaded here; try again elsewhere")

    def _left(self, name: str) -> None:
        flight = self._leaving.pop(name, None)
        if flight is not None:
            flight.finish()

    def _settled(self, name: str, version: int) -> None:
        """A load of a client's has ended here; version: this replica's own, 0: it has failed."""
        if self.records is None:
            return
        shared = self.records.versions.pop(version, 0)
        if shared:
            self._here[name] = shared
        flight = self.records.saving.pop(name, None)
        if flight is not None:
            flight.finish()

    # ------------------------------------------------------------------ what the registry says

    def apply(self, change: TableChange) -> Steps[None]:
        """Requests that come from now on go by it."""
        self.table.apply(change)
        assert self.records is not None
        self.records.follow()
        if change.weight_version is not None and change.weight_version != self._registry.weight_version:
            self._registry.label_weights(change.weight_version)
        for record in change.records:
            stale = record.name in self._here and self._here[record.name] != record.version
            wanted = stale or (record.pinned and record.name not in self._here)
            if wanted and self._saving(record.name) is None and not record.parts:
                yield from self._board(record)
        for name in [name for name in self._here if name not in self.table.records]:
            yield from self._forget(name)

    def _forget(self, name: str) -> Steps[None]:
        """The name is gone: what is here of it ends with its last request."""
        del self._here[name]
        current = self._registry.current(name)
        if current is None or current.state is not RefState.LOADED or self._registry.is_loading(name):
            return
        try:
            version = self._registry.begin_unload(name)
        except MultiloraError as e:  # a composition that is gone, too, and comes next
            logger.debug("adapter %r stays a little: %s", name, e)
            return
        yield from Spawn(self._manager.drop(version))
