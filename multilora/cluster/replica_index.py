"""The replicas as a router knows them: who holds which adapter, how loaded each is, who has read which prefix.

Every question of a decision is answered in constant time, or by one pass over an array; work that grows with the
number of adapters is done when a replica reports.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import numpy as np

from multilora.cluster.hash_ring import HashRing
from multilora.cluster.route_request import ReplicaReport

AdapterKey = tuple[str, int]
"""Name and version."""
H = TypeVar("H", bound=Hashable)
PROMPT_TOKENS = 100
"""Prompt tokens to read that weigh as one more request. A request that decodes makes each step a little longer, a
prompt that is read before another one delays its first token by its whole length."""


class RoutedReplica:
    """One replica. own: load of what this router has sent there and has not ended; others: of everybody else's;
    own_prompt, others_prompt: tokens of their prompts that are not read yet; reported: it has said something already;
    assigned: bytes of the adapters that are there or on their way."""

    __slots__ = (
        "assigned", "device", "host", "name", "others", "others_prompt", "own", "own_prompt", "place", "reported",
        "room", "weight",
    )  # fmt: skip

    def __init__(self, name: str, weight: float, place: int):
        self.name = name
        self.weight = weight
        self.place = place  # in the arrays of the index
        self.own = self.others = 0.0
        self.own_prompt = self.others_prompt = 0
        self.reported = False
        self.device: set[AdapterKey] = set()
        self.host: set[AdapterKey] = set()
        self.assigned = 0
        self.room = 0  # bytes for adapters; 0: no limit is known

    @property
    def load(self) -> float:
        return self.own + self.others

    @property
    def wait(self) -> float:
        """What a request has before it here, relative to what the replica can do: requests, and prompts that are not
        read yet, of which PROMPT_TOKENS are as much as one request."""
        return (self.own + self.others + (self.own_prompt + self.others_prompt) / PROMPT_TOKENS) / self.weight


class Holders:
    """Which replicas hold an adapter, on one tier. A list for each, so that any of them can be drawn."""

    def __init__(self) -> None:
        self._replicas: dict[AdapterKey, list[RoutedReplica]] = {}

    def of(self, key: AdapterKey) -> list[RoutedReplica]:
        """Not to be changed by the caller."""
        return self._replicas.get(key, [])

    def add(self, key: AdapterKey, replica: RoutedReplica) -> None:
        self._replicas.setdefault(key, []).append(replica)

    def remove(self, key: AdapterKey, replica: RoutedReplica) -> None:
        kept = self._replicas[key]
        kept.remove(replica)
        if not kept:
            del self._replicas[key]


class RecentPlaces(Generic[H]):
    """Where something was sent last: a prefix, a session. Forgets the ones that were used longest ago."""

    def __init__(self, most: int):
        self._most = most
        self._places: OrderedDict[H, RoutedReplica] = OrderedDict()

    def get(self, key: H) -> RoutedReplica | None:
        return self._places.get(key)

    def put(self, key: H, replica: RoutedReplica) -> None:
        self._places[key] = replica
        self._places.move_to_end(key)
        if len(self._places) > self._most:
            self._places.popitem(last=False)


class ReplicaIndex:
    """total_load, total_weight: sums over all replicas, kept up to date."""

    def __init__(self) -> None:
        self.ring = HashRing()
        self.device = Holders()
        self.host = Holders()
        self.total_load = self.total_weight = 0.0
        self.total_assigned = 0
        self._replicas: dict[str, RoutedReplica] = {}
        self.order: list[RoutedReplica] = []
        self._relative = np.zeros(0)  # load over weight, by place

    def __contains__(self, name: str) -> bool:
        return name in self._replicas

    def __len__(self) -> int:
        return len(self.order)

    def get(self, name: str) -> RoutedReplica | None:
        return self._replicas.get(name)

    def alive(self, replica: RoutedReplica | None) -> bool:
        """Whether it is one of them now: places may be of replicas that are gone."""
        return replica is not None and self._replicas.get(replica.name) is replica

    def add(self, name: str, weight: float) -> None:
        """A replica that holds nothing yet."""
        replica = RoutedReplica(name, weight, len(self.order))
        self._replicas[name] = replica
        self.order.append(replica)
        self._relative = np.append(self._relative, 0.0)
        self.ring.add(name, weight)
        self.total_weight += weight

    def remove(self, name: str) -> None:
        """The replica is gone, with all that it held."""
        replica = self._replicas.pop(name)
        self._hold(replica, set(), set())
        self.ring.remove(name)
        self.total_weight -= replica.weight
        self.total_load -= replica.load
        self.total_assigned -= replica.assigned
        last = self.order.pop()
        if last is not replica:
            self.order[replica.place], last.place = last, replica.place
        self._relative = self._relative[:-1].copy()
        if last is not replica:
            self._relative[last.place] = last.load / last.weight
        if not self.order:
            self.total_load = 0.0

    def change_load(self, replica: RoutedReplica, own: float, others: float) -> None:
        """Its load is this now."""
        self.total_load += own + others - replica.load
        replica.own, replica.others = own, others
        self._relative[replica.place] = (own + others) / replica.weight

    def least_loaded(self, avoid: Iterable[str]) -> RoutedReplica | None:
        """Relative to its weight, of all that are not to be avoided."""
        relative = self._relative
        avoided = [self._replicas[name].place for name in avoid if name in self._replicas]
        if avoided:
            relative = relative.copy()
            relative[avoided] = np.inf
        if len(avoided) == len(self.order):
            return None
        return self.order[int(np.argmin(relative))]

    def report(self, replica: RoutedReplica, report: ReplicaReport, assigned: int) -> None:
        """What the replica says it holds replaces what was expected of it. assigned: bytes of that."""
        device, host = set(report.device.items()), set(report.host.items())
        self._hold(replica, device, host - device)
        self.total_assigned += assigned - replica.assigned
        replica.assigned, replica.room = assigned, report.adapter_bytes

    def expect(self, replica: RoutedReplica, key: AdapterKey, nbytes: int) -> None:
        """The adapter is on its way to the replica, which will say so itself."""
        if key in replica.device:
            return
        if key in replica.host:
            replica.host.discard(key)
            self.host.remove(key, replica)
        else:
            replica.assigned += nbytes
            self.total_assigned += nbytes
        replica.device.add(key)
        self.device.add(key, replica)

    def _hold(self, replica: RoutedReplica, device: set[AdapterKey], host: set[AdapterKey]) -> None:
        for tier, before, now in ((self.device, replica.device, device), (self.host, replica.host, host)):
            for key in before - now:
                tier.remove(key, replica)
            for key in now - before:
                tier.add(key, replica)
        replica.device, replica.host = device, host
