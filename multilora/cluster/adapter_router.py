"""Which replica a request goes to: where its adapter is, as long as that replica is not overloaded.

In this order: the replica of its session; one that has the adapter on the device, then one that has it in host
memory, the one with the prompt's prefix before others; one that only has the prefix; else a place on the ring of
consistent hashes, which all routers agree about. A replica is *full* while its load per weight is above `factor`
times the mean of all and above `slack`; it gets nothing while another one is not (Mirrokni's bound). So an adapter
that is hot has more holders, and of those two are drawn and the one with the shorter wait is taken. While there is
room for it that nobody else needs, an adapter gets `copies` holders, hot or not: so that there is a choice, and the
death of one costs nothing. Pure: no clock, no I/O, and used from one thread.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from multilora.cluster.replica_index import RecentPlaces, ReplicaIndex, RoutedReplica
from multilora.cluster.route_request import AdapterNeed, ReplicaReport, RouteRequest

PROBES = 32  # members of the ring that are looked at, before the least loaded replica of all is
COPY_PROBES = 4  # the same for a further copy, which nobody needs now
OTHERS_FOLLOW = 0.1
"""How far the load that others have sent to a replica moves towards what a new report says of it. Routers that
follow reports, which are a second old, at once all run to the same replica: the 99th percentile of the first token
doubles in the simulator."""
MAX_SESSIONS = 100_000
MAX_PREFIXES = 200_000


@dataclass(frozen=True)
class RouterSettings:
    """factor: how far above the mean a replica's load may be. slack: load per weight that is never too much, so that
    an idle cluster does not scatter adapters. byte_factor: the same as `factor` for bytes of adapters, when one is
    brought somewhere. copies: holders that an adapter gets where there is room, 1: only as many as its load needs."""

    factor: float = 1.25
    slack: float = 8.0
    byte_factor: float = 1.25
    copies: int = 2
    seed: int = 0


class Reason(Enum):
    """Why a replica was chosen."""

    SESSION = "session"
    DEVICE = "device"
    HOST = "host"
    PREFIX = "prefix"
    PLACED = "placed"  # nobody has the adapter
    SPREAD = "spread"  # those that have it are full
    COPY = "copy"  # too few have it, and there is room
    LEAST = "least"  # the least loaded: nothing else counts


@dataclass(frozen=True, slots=True)
class Choice:
    """replica: its name."""

    replica: str
    reason: Reason


class AdapterRouter:
    """Every `choose` that returns a choice is followed by one `prompt_read` with its prompt, and then by one `ended`
    with its cost."""

    def __init__(self, settings: RouterSettings = RouterSettings()):
        self._settings = settings
        self._index = ReplicaIndex()
        self._random = random.Random(settings.seed)
        self._sessions: RecentPlaces[str] = RecentPlaces(MAX_SESSIONS)
        self._prefixes: RecentPlaces[int] = RecentPlaces(MAX_PREFIXES)

    @property
    def replicas(self) -> Sequence[str]:
        """Names, in no order."""
        return [replica.name for replica in self._index.order]

    def load_of(self, name: str) -> float:
        """Load of a replica, as far as it is known here; 0 if it is gone."""
        replica = self._index.get(name)
        return replica.load if replica else 0.0

    def set_replicas(self, weights: Mapping[str, float]) -> None:
        """There are these replicas, by name, from now on; those that stay keep what is known of them."""
        for name in set(self.replicas) - weights.keys():
            self._index.remove(name)
        for name, weight in weights.items():
            if name not in self._index:
                self._index.add(name, weight)

    def remove(self, name: str) -> None:
        """The replica is dead, or on its way out; one that is unknown is ignored."""
        if name in self._index:
            self._index.remove(name)

    def report(self, name: str, report: ReplicaReport, sizes: Mapping[str, int]) -> None:
        """What a replica says; one that is unknown is ignored. sizes: bytes of adapters by name, where they are
        known. What it has beyond this router's own requests was sent by others."""
        replica = self._index.get(name)
        if replica is None:
            return
        assigned = sum(sizes.get(adapter, 0) for adapter in report.device.keys() | report.host.keys())
        self._index.report(replica, report, assigned)
        sent_by_others = max(0.0, report.load - replica.own)
        follow = OTHERS_FOLLOW if replica.reported else 1.0
        replica.reported = True
        self._index.change_load(replica, replica.own, replica.others + follow * (sent_by_others - replica.others))
        replica.others_prompt = max(0, report.prompt - replica.own_prompt)

    def heard(self, name: str, load: float, prompt: int) -> None:
        """What a replica says beside an answer: its load, and tokens of prompts that are not read."""
        replica = self._index.get(name)
        if replica is not None:
            sent_by_others = max(0.0, load - replica.own)
            others = replica.others + OTHERS_FOLLOW * (sent_by_others - replica.others)
            self._index.change_load(replica, replica.own, others)
            replica.others_prompt = max(0, prompt - replica.own_prompt)

    def choose(self, request: RouteRequest) -> Choice | None:
        """None: there is no replica, or all are to be avoided."""
        found = self._by_session(request) or self._by_adapter(request) or self._by_prefix(request)
        found = found or self._placed(request) or self._least(request)
        if found is None:
            return None
        replica, reason = found
        self._index.change_load(replica, replica.own + request.cost, replica.others)
        replica.own_prompt += request.prompt
        if request.adapter is not None:
            self._index.expect(replica, request.adapter.key, request.adapter.nbytes)
        if request.session:
            self._sessions.put(request.session, replica)
        for key in request.prefixes:
            self._prefixes.put(key, replica)
        return Choice(replica.name, reason)

    def prompt_read(self, name: str, prompt: int) -> None:
        """A request that was sent to the replica has its first token, or is over."""
        replica = self._index.get(name)
        if replica is not None:
            replica.own_prompt = max(0, replica.own_prompt - prompt)

    def ended(self, name: str, cost: float) -> None:
        """A request that was sent to the replica is over, however it ended."""
        replica = self._index.get(name)
        if replica is not None:
            self._index.change_load(replica, max(0.0, replica.own - cost), replica.others)

    # ------------------------------------------------------------------ the steps of `choose`

    def _by_session(self, request: RouteRequest) -> tuple[RoutedReplica, Reason] | None:
        replica = self._sessions.get(request.session) if request.session else None
        if replica is None or not self._takes(replica, request):
            return None
        return replica, Reason.SESSION

    def _by_adapter(self, request: RouteRequest) -> tuple[RoutedReplica, Reason] | None:
        if request.adapter is None:
            return None
        key, prefix = request.adapter.key, self._with_prefix(request)
        further = None if prefix else self._further_copy(request, request.adapter)
        if further is not None:
            return further, Reason.COPY
        for tier, reason in ((self._index.device, Reason.DEVICE), (self._index.host, Reason.HOST)):
            holders = tier.of(key)
            if prefix is not None and prefix in holders:
                return prefix, reason
            replica = self._better_of_two(holders, request)
            if replica is not None:
                return replica, reason
        return None

    def _further_copy(self, request: RouteRequest, need: AdapterNeed) -> RoutedReplica | None:
        """Where one more holder of an adapter should be that has some, but too few; of known size only, and where
        nothing has to go for it."""
        device, host = self._index.device.of(need.key), self._index.host.of(need.key)
        if not 0 < len(device) + len(host) < self._settings.copies or not need.nbytes:
            return None
        for name in islice(self._index.ring.walk(need.name), COPY_PROBES):
            replica = self._index.get(name)
            assert replica is not None
            if replica in device or replica in host or not replica.room:
                continue
            if self._takes(replica, request) and self._has_room(replica, need):
                return replica
        return None

    def _by_prefix(self, request: RouteRequest) -> tuple[RoutedReplica, Reason] | None:
        replica = self._with_prefix(request)
        return None if replica is None else (replica, Reason.PREFIX)

    def _placed(self, request: RouteRequest) -> tuple[RoutedReplica, Reason] | None:
        """Along the ring, where there is room both for the request and for the adapter, or at least for the
        request."""
        need = request.adapter
        if need is None:
            return self._drawn(request)
        roomless: RoutedReplica | None = None
        for name in islice(self._index.ring.walk(need.name), PROBES):
            replica = self._index.get(name)
            assert replica is not None
            if self._takes(replica, request):
                if self._has_room(replica, need):
                    return replica, self._reason_of_place(need)
                roomless = roomless or replica
        return None if roomless is None else (roomless, self._reason_of_place(need))

    def _drawn(self, request: RouteRequest) -> tuple[RoutedReplica, Reason] | None:
        replica = self._better_of_two(self._index.order, request)
        return None if replica is None else (replica, Reason.LEAST)

    def _least(self, request: RouteRequest) -> tuple[RoutedReplica, Reason] | None:
        replica = self._index.least_loaded(request.avoid)
        return None if replica is None else (replica, Reason.LEAST)

    # ------------------------------------------------------------------ what they ask

    def _takes(self, replica: RoutedReplica, request: RouteRequest) -> bool:
        """Whether it is there, not full, and has not failed the request before."""
        return (
            self._index.alive(replica)
            and replica.name not in request.avoid
            and replica.load < self._bound(replica.weight, request.cost)
        )

    def _bound(self, weight: float, cost: float) -> float:
        mean = (self._index.total_load + cost) / self._index.total_weight
        return weight * max(self._settings.slack, self._settings.factor * mean)

    def _has_room(self, replica: RoutedReplica, need: AdapterNeed) -> bool:
        after = replica.assigned + need.nbytes
        if replica.room and after > replica.room:
            return False
        mean = (self._index.total_assigned + need.nbytes) / self._index.total_weight
        return replica.assigned <= replica.weight * self._settings.byte_factor * mean

    def _reason_of_place(self, need: AdapterNeed) -> Reason:
        held = self._index.device.of(need.key) or self._index.host.of(need.key)
        return Reason.SPREAD if held else Reason.PLACED

    def _with_prefix(self, request: RouteRequest) -> RoutedReplica | None:
        """The replica that has read the longest beginning of the prompt, of those that take the request."""
        for key in request.prefixes:
            replica = self._prefixes.get(key)
            if replica is not None and self._takes(replica, request):
                return replica
        return None

    def _better_of_two(self, some: Sequence[RoutedReplica], request: RouteRequest) -> RoutedReplica | None:
        """The one of two that are drawn with the shorter wait; if neither takes the request, of a few the first that
        does."""
        if len(some) <= 2:
            drawn = list(some)
        else:
            first, second = self._random.randrange(len(some)), self._random.randrange(len(some) - 1)
            drawn = [some[first], some[second + (second >= first)]]
        drawn = [replica for replica in drawn if self._takes(replica, request)]
        if drawn:
            return min(drawn, key=lambda replica: replica.wait)
        return next((replica for replica in some[:PROBES] if self._takes(replica, request)), None)
