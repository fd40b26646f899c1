"""What a replica writes down: nothing of its own, all of it at the cluster's registry, whose changes it follows.

So the code of one server, which has a change on the disk before it answers, has it everywhere before it answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from multilora.cluster.cluster_table import ClusterTable, TableChange
from multilora.errors import MultiloraError, StorageFailed
from multilora.front.effects import Flight
from multilora.front.records import AdapterRecord, Records, SavedState

T = TypeVar("T")

CALL_SECONDS = 60.0
"""For an answer of the registry: more than a lease."""


class RegistryCalls(Protocol):
    """The registry, wherever it is; see `SharedRegistry`. Raises StorageFailed where it does not answer."""

    def join(self, member: str) -> Awaitable[TableChange]: ...

    def leave(self, member: str) -> Awaitable[None]: ...

    def changes(self, member: str | None, seq: int) -> Awaitable[TableChange | None]: ...

    def save(self, record: AdapterRecord, *, replace: bool) -> Coroutine[Any, Any, int]: ...

    def remove(self, name: str) -> Coroutine[Any, Any, None]: ...

    def label_weights(self, weight_version: str) -> Coroutine[Any, Any, None]: ...

    def share(self, member: str, served: dict[str, float]) -> Awaitable[dict[str, float]]: ...


class SharedRecords(Records):
    """`names` follow the table. saving: names that this replica has changed at the registry, and not yet here;
    versions: the cluster's, by this replica's own. replaces: whether a load, by its own version, may replace another
    one. loop: where `calls` are awaited; the other methods block a thread."""

    durable = True

    def __init__(self, table: ClusterTable, calls: RegistryCalls, loop: asyncio.AbstractEventLoop):
        super().__init__()
        self.table = table
        self.saving: dict[str, Flight] = {}
        self.versions: dict[int, int] = {}
        self.replaces: Callable[[int], bool] = lambda _version: True
        self._calls = calls
        self._loop = loop
        self.follow()

    def follow(self) -> None:
        """The table has changed."""
        self.names = set(self.table.records)

    def read(self) -> SavedState:
        """Nothing is loaded at the start of a replica: requests bring what they need."""
        return SavedState(weight_version=self.table.weight_version)

    def save(self, record: AdapterRecord) -> None:
        """See `Records`. Returns when every replica goes by it."""
        self.saving.setdefault(record.name, Flight())
        call = self._calls.save(record, replace=self.replaces(record.version))
        self.versions[record.version] = self._wait(call)

    def remove(self, name: str) -> None:
        """See `Records`. Returns when no replica serves it any more."""
        self._wait(self._calls.remove(name))

    def label_weights(self, weight_version: str) -> None:
        """See `Records`."""
        self._wait(self._calls.label_weights(weight_version))

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(call, self._loop).result(CALL_SECONDS)
        except MultiloraError:
            raise
        except TimeoutError:
            raise StorageFailed(
                "the cluster's registry does not answer; whether the change was made is not known"
            ) from None
