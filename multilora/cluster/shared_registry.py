"""The registry of a cluster: the one writer of names, and who is told of what it writes before it answers.

A change is on the disk (`StateDirectory`), then every replica goes by it, then its call returns: from then on no new
request meets what was before. A replica goes by a change once it asks for those after it. One that is dead is not
waited for; one that is silent is, until its lease has run out, after which it serves no adapter until it is heard of
again (`local_copies.py`). After a restart the first change waits for a lease, too: who was there before is not known.

Knows nothing of Ray, of engines or of requests; all methods belong to one event loop.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from multilora.cluster.cluster_table import ClusterTable, TableChange
from multilora.cluster.tenant_ledger import TenantLedger
from multilora.errors import AdapterAlreadyLoaded, AdapterError, AdapterNotLoaded
from multilora.front.records import AdapterRecord, Records
from multilora.lora_path import LoraPath

logger = logging.getLogger(__name__)

LEASE_SECONDS = 20.0
"""How long a replica goes by what it knows without hearing anything."""
POLL_SECONDS = 5.0
"""After so long somebody who asks for changes is told that there are none."""
PROBE_SECONDS = 0.5
"""Between two questions whether a replica that is waited for is dead."""
LOG_LENGTH = 4096
"""Changes that are kept; whoever is further behind is told everything."""


@dataclasses.dataclass
class _Member:
    """A replica. seq: of the latest change that it goes by; heard: when it last asked."""

    seq: int
    heard: float


class SharedRegistry:
    """state: where it is all written; startup: the adapters that are there unless a client has unloaded them.
    is_dead: whether a replica is known to have ended. restarted: there may be replicas that have joined an earlier
    registry. first: changes have higher numbers, and those of an earlier one had lower ones."""

    def __init__(
        self,
        state: Records,
        startup: Sequence[LoraPath],
        is_dead: Callable[[str], Awaitable[bool]],
        *,
        restarted: bool = False,
        first: int = 0,
        clock: Callable[[], float] = time.monotonic,
        lease: float = LEASE_SECONDS,
    ):
        self._state, self._is_dead, self._clock, self._lease = state, is_dead, clock, lease
        self._table = ClusterTable()
        self._members: dict[str, _Member] = {}
        self._ledger = TenantLedger()
        self._log: deque[TableChange] = deque(maxlen=LOG_LENGTH)
        self._writing = asyncio.Lock()
        self._moved = asyncio.Condition()
        self._quiet_until = clock() + lease if restarted else 0.0
        self._next_version = 1
        self._restore(startup, first)

    def _restore(self, startup: Sequence[LoraPath], first: int) -> None:
        saved = self._state.read()
        self._state.startup |= {entry.lora_name: entry.lora_path for entry in startup}
        self._next_version = saved.next_version
        records = {record.name: record for record in saved.adapters}
        for entry in startup:
            name, path = entry.lora_name, entry.lora_path
            if name not in records and saved.unloaded.get(name) != path:
                version = self._take_version()
                records[name] = AdapterRecord(name=name, version=version, path=path, pinned=entry.pinned)
        known, label = list(records.values()), saved.weight_version
        self._table.apply(TableChange(seq=first, whole=True, records=known, weight_version=label))

    # ------------------------------------------------------------------ who is told

    async def join(self, member: str) -> TableChange:
        """A replica that is new, or has lost touch. Everything that there is; it goes by that from now on."""
        self._members[member] = _Member(self._table.seq, self._clock())
        return self._table.everything()

    async def leave(self, member: str) -> None:
        """The replica serves nothing any more."""
        self._members.pop(member, None)
        await self._notify()

    async def members(self) -> list[str]:
        """Names of the replicas that there are: of those that are late, the dead are left out."""
        late = self._clock() - 2 * POLL_SECONDS
        await self._drop_dead([name for name, member in self._members.items() if member.heard < late])
        return list(self._members)

    def used_folders(self) -> list[str]:
        """Directories that adapters lie in."""
        return [record.local for record in self._table.records.values() if record.local]

    async def changes(self, member: str | None, seq: int, epoch: float = POLL_SECONDS) -> TableChange | None:
        """What comes after change `seq`, by which `member` goes now; waits for it. None after `epoch` seconds
        without one. member: None: one who only looks on. A replica that has not joined is told everything."""
        if member is not None:
            known = self._members.get(member)
            if known is None:
                return await self.join(member)
            known.seq, known.heard = seq, self._clock()
            await self._notify()
        deadline = self._clock() + epoch
        async with self._moved:
            while self._table.seq == seq and (left := deadline - self._clock()) > 0:
                try:
                    await asyncio.wait_for(self._moved.wait(), left)
                except TimeoutError:
                    break
        return None if self._table.seq == seq else self._since(seq)

    async def share(self, member: str, served: dict[str, float]) -> dict[str, float]:
        """What a replica has served tenants since it last asked, for what the others have."""
        self._ledger.keep(self._members.keys() | {member})
        return self._ledger.exchange(member, served)

    def _since(self, seq: int) -> TableChange:
        newer = [change for change in self._log if change.seq > seq]
        if not 0 <= seq <= self._table.seq or len(newer) != self._table.seq - seq:
            return self._table.everything()
        records, gone = dict[str, AdapterRecord](), dict[str, None]()
        for change in newer:
            for name in change.gone:
                records.pop(name, None)
                gone[name] = None
            for record in change.records:
                gone.pop(record.name, None)
                records[record.name] = record
        return TableChange(
            seq=self._table.seq,
            records=list(records.values()),
            gone=list(gone),
            weight_version=self._table.weight_version,
        )

    # ------------------------------------------------------------------ changes

    async def save(self, record: AdapterRecord, *, replace: bool) -> int:
        """From now on the record's name is this adapter, everywhere. Returns its version.

        Raises AdapterAlreadyLoaded without `replace` if the name is taken, AdapterError if a part of a composition is
        not there, StorageFailed.
        """
        async with self._writing:
            if not replace and record.name in self._table.records:
                raise AdapterAlreadyLoaded(f"adapter {record.name!r} is already loaded; unload it first")
            missing = [name for name, _ in record.parts if name not in self._table.records]
            if missing:
                raise AdapterError(f"adapter {missing[0]!r}, a part of {record.name!r}, was unloaded meanwhile")
            saved = dataclasses.replace(record, version=self._take_version())
            await asyncio.to_thread(self._state.save, saved)
            change = self._commit(records=[saved])
        await self._everywhere(change)
        return saved.version

    async def remove(self, name: str) -> None:
        """From now on the name is nothing, everywhere. Raises AdapterNotLoaded, AdapterError if a composition needs
        it, StorageFailed."""
        async with self._writing:
            if name not in self._table.records:
                raise AdapterNotLoaded(f"adapter {name!r} does not exist", param="lora_name")
            users = [record.name for record in self._table.records.values() if name in dict(record.parts)]
            if users:
                raise AdapterError(f"adapter {name!r} is part of composition {users[0]!r}: unload that first")
            await asyncio.to_thread(self._state.remove, name)
            change = self._commit(gone=[name])
        await self._everywhere(change)

    async def label_weights(self, weight_version: str) -> None:
        """The cluster's label of its weights, everywhere. Raises StorageFailed."""
        async with self._writing:
            await asyncio.to_thread(self._state.label_weights, weight_version)
            change = self._commit(weight_version=weight_version)
        await self._everywhere(change)

    def _take_version(self) -> int:
        self._next_version += 1
        return self._next_version - 1

    def _commit(
        self,
        records: list[AdapterRecord] | None = None,
        gone: list[str] | None = None,
        weight_version: str | None = None,
    ) -> TableChange:
        change = TableChange(
            seq=self._table.seq + 1,
            records=records or [],
            gone=gone or [],
            weight_version=weight_version or self._table.weight_version,
        )
        self._log.append(change)
        self._table.apply(change)
        return change

    async def _everywhere(self, change: TableChange) -> None:
        """Wait until every replica goes by the change, or cannot serve anything."""
        await self._notify()
        probed = self._clock()
        while behind := self._behind(change.seq):
            async with self._moved:
                if self._behind(change.seq):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._moved.wait(), PROBE_SECONDS)
            if self._clock() - probed >= PROBE_SECONDS:
                probed = self._clock()
                await self._drop_dead(behind)

    def _behind(self, seq: int) -> list[str]:
        now = self._clock()
        for name, member in list(self._members.items()):
            if now - member.heard > self._lease:
                logger.warning(
                    "replica %s was not heard of for %g s: it serves no adapter until it is", name, self._lease
                )
                del self._members[name]
        behind = [name for name, member in self._members.items() if member.seq < seq]
        return behind or ([""] if now < self._quiet_until else [])

    async def _drop_dead(self, names: list[str]) -> None:
        for name in names:
            if name and await self._is_dead(name):
                logger.info("replica %s is dead", name)
                self._members.pop(name, None)

    async def _notify(self) -> None:
        async with self._moved:
            self._moved.notify_all()
