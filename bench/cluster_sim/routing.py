"""The routers that are compared: the package's own, and those that know nothing of adapters.

Each stands for all ingress processes of a cluster. The package's is there once per ingress, each of which learns what
the others do only from the replicas' reports; the others know all loads at any time, which favours them.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.cluster_sim.engine import SimulatedEngine, bytes_of
from bench.cluster_sim.trace import Arrival
from multilora.cluster.adapter_router import AdapterRouter, RouterSettings
from multilora.cluster.hash_ring import HashRing
from multilora.cluster.route_request import AdapterNeed, ReplicaReport, RouteRequest


class Routing(Protocol):
    """engines: by name, those that are alive."""

    def use(self, engines: Mapping[str, SimulatedEngine]) -> None: ...

    def choose(self, arrival: Arrival) -> tuple[str, object]:
        """The replica, and what `ended` is given."""

    def prompt_read(self, replica: str, owner: object) -> None:
        """The request has its first token."""

    def ended(self, replica: str, owner: object) -> None: ...

    def report(self) -> None:
        """A second has passed: replicas say what they have."""


class _Blind:
    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._engines: Mapping[str, SimulatedEngine] = {}
        self._names: Sequence[str] = ()

    def use(self, engines: Mapping[str, SimulatedEngine]) -> None:
        self._engines, self._names = engines, list(engines)

    def prompt_read(self, replica: str, owner: object) -> None:
        del replica, owner

    def ended(self, replica: str, owner: object) -> None:
        del replica, owner

    def report(self) -> None:
        pass


class Random(_Blind):
    def choose(self, arrival: Arrival) -> tuple[str, object]:
        del arrival
        return self._random.choice(self._names), None


class RoundRobin(_Blind):
    _next = 0

    def choose(self, arrival: Arrival) -> tuple[str, object]:
        del arrival
        self._next += 1
        return self._names[self._next % len(self._names)], None


class LeastLoaded(_Blind):
    """Of all replicas, the first of those with the fewest requests, beginning anywhere."""

    def choose(self, arrival: Arrival) -> tuple[str, object]:
        del arrival
        start = self._random.randrange(len(self._names))
        loads = [engine.load for engine in self._engines.values()]
        loads = loads[start:] + loads[:start]
        return self._names[(start + loads.index(min(loads))) % len(loads)], None


class PlainHash(_Blind):
    """An adapter's requests all go to one replica, whatever its load."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self._ring = HashRing()

    def use(self, engines: Mapping[str, SimulatedEngine]) -> None:
        for gone in set(self._names) - engines.keys():
            self._ring.remove(gone)
        for name in engines:
            self._ring.add(name)
        super().use(engines)

    def choose(self, arrival: Arrival) -> tuple[str, object]:
        return next(iter(self._ring.walk(f"adapter-{arrival.adapter}"))), None


@dataclass(eq=False, slots=True)
class _Sent:
    router: AdapterRouter
    prompt: int


class AdapterAware:
    """routers: how many ingress processes there are. Each hears of a replica when a request arrives there, with its
    first token and its end, and of all replicas by their reports."""

    def __init__(self, seed: int, settings: RouterSettings | None = None, routers: int = 4):
        self._routers = [AdapterRouter(settings or RouterSettings(seed=seed + i)) for i in range(routers)]
        self._random = random.Random(seed)
        self._engines: Mapping[str, SimulatedEngine] = {}
        self._names: dict[int, str] = {}  # of adapters
        self._sizes: dict[str, int] = {}  # their bytes, by name

    def use(self, engines: Mapping[str, SimulatedEngine]) -> None:
        self._engines = engines
        for router in self._routers:
            router.set_replicas(dict.fromkeys(engines, 1.0))

    def choose(self, arrival: Arrival) -> tuple[str, object]:
        router = self._random.choice(self._routers)
        name = self._name(arrival.adapter)
        need = AdapterNeed(name, 1, self._sizes[name])
        choice = router.choose(RouteRequest(need, prompt=arrival.prompt))
        assert choice is not None
        engine = self._engines[choice.replica]
        router.heard(choice.replica, engine.load + 1.0, engine.unread + arrival.prompt)
        return choice.replica, _Sent(router, arrival.prompt)

    def prompt_read(self, replica: str, owner: object) -> None:
        assert isinstance(owner, _Sent)
        owner.router.prompt_read(replica, owner.prompt)
        owner.prompt = 0
        self._hear(replica, owner.router)

    def ended(self, replica: str, owner: object) -> None:
        assert isinstance(owner, _Sent)
        owner.router.prompt_read(replica, owner.prompt)
        owner.router.ended(replica, 1.0)
        self._hear(replica, owner.router)

    def _hear(self, replica: str, router: AdapterRouter) -> None:
        engine = self._engines.get(replica)
        if engine is not None:
            router.heard(replica, engine.load, engine.unread)

    def report(self) -> None:
        for name, engine in self._engines.items():
            device, host = ({self._name(i): 1 for i in tier.items} for tier in (engine.device, engine.host))
            room = int(max(engine.device.most, engine.host.most))
            report = ReplicaReport(float(engine.load), 1.0, device, host, room, engine.unread)
            for router in self._routers:
                router.report(name, report, self._sizes)

    def _name(self, adapter: int) -> str:
        name = self._names.get(adapter)
        if name is None:
            name = self._names[adapter] = f"adapter-{adapter}"
            self._sizes[name] = int(bytes_of(adapter))
        return name


ROUTINGS = {
    "adapter-aware": AdapterAware,
    "plain hash": PlainHash,
    "least loaded": LeastLoaded,
    "round robin": RoundRobin,
    "random": Random,
    "ideal": LeastLoaded,  # with every adapter on every device
}
