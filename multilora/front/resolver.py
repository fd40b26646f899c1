"""The resolver: an adapter that is asked for by a name that is not loaded is looked for, and loaded, without I/O.

It owns the flights, what is known not to be there, and the quotas. A flight is one for all requests that wait for a
name, and ends once the clients of all are gone. Of the adapters that it has loaded the one unused longest is unloaded
for room; it never touches one that was loaded otherwise. Where names are looked for is the fetcher's business.

    hold ─┬─ loaded by the resolver → held, and now the most recently used
          ├─ missed or failed a moment ago → the same again
          └─ else a flight: find → make room → load → hit
                              ├─ nowhere → miss
                              └─ an error → failure

Requests `hold` names before they are read: what is held is not unloaded to make room until the request itself has
acquired its adapters, whatever else lands meanwhile.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from multilora.config import Config
from multilora.errors import BadRequest, EngineDead, MultiloraError, QueueFull, from_wire
from multilora.front.access import SEPARATOR
from multilora.front.adapter_manager import AdapterManager
from multilora.front.adapter_ref import Held, RefState
from multilora.front.effects import CarryThrough, Flight, Spawn, Steps, WaitUntilDone
from multilora.front.fetcher import Fetcher, Found
from multilora.front.observer import Observer
from multilora.front.registry import AdapterRegistry

logger = logging.getLogger(__name__)

MAX_FLIGHTS = 64
FLIGHTS_AT_ONCE = 8
"""How many flights one request begins side by side."""

ABSENT_SECONDS = 5.0
"""How long a name that was not found, or could not be loaded, is not looked for again."""

MAX_ABSENT = 4096
"""Names that are remembered so."""


@dataclass
class _Resolved:
    """What the resolver has loaded under a name, or is loading (`version` None): so many bytes of the spool."""

    nbytes: int
    version: int | None = None


@dataclass(frozen=True)
class _Absent:
    """A name is known to be absent `until` then (time.monotonic). `error`: why it could not be loaded; None: it was
    not found."""

    until: float
    error: MultiloraError | None


class _NameFlight(Flight):
    """The search for one name. waiting: how many requests wait for it, or got an error and may come back."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0


class Resolver:
    """One per front. Without any --lora-resolver-… it does nothing."""

    def __init__(
        self,
        config: Config,
        registry: AdapterRegistry,
        manager: AdapterManager,
        fetcher: Fetcher,
        observer: Observer,
    ):
        self._config = config
        self._registry = registry
        self._manager = manager
        self._fetcher = fetcher
        self._observer = observer
        self._resolved: OrderedDict[str, _Resolved] = OrderedDict()  # the least recently used first
        self._flights: dict[str, _NameFlight] = {}
        self._evictions: dict[str, Flight] = {}
        self._absent: OrderedDict[str, _Absent] = OrderedDict()  # the oldest first
        self._wanted: Counter[str] = Counter()  # by requests that are in `hold`
        self._num_waiting = 0  # requests

    @property
    def active(self) -> bool:
        """Whether adapters are looked for anywhere."""
        return self._config.has_resolver

    def hold(self, names: Iterable[str]) -> Steps[Sequence[Held]]:
        """Load what is not loaded and can be found, and hold what the resolver has loaded; see `release`.

        A name that is found nowhere is left out: whoever acquires it gets the registry's error. Raises the error of
        an adapter that was found and cannot be loaded, QueueFull if that takes longer than --lora-resolver-timeout or
        there is no room.
        """
        names = [name for name in names if self._concerns(name)] if self.active else []
        if not names:
            return ()
        self._wanted.update(names)
        try:
            yield from self._land([name for name in names if self._is_missing(name)])
            held = []
            for name in names:
                if self._is_loaded(name):
                    self._resolved.move_to_end(name)
                    held.append(self._registry.acquire(((name, 1.0),)))
            return held
        finally:
            self._wanted -= Counter(names)

    def release(self, held: Sequence[Held]) -> None:
        """The request has acquired its adapters, or failed."""
        for one in held:
            self._registry.release(one)

    # ------------------------------------------------------------------ which names

    def _concerns(self, name: str) -> bool:
        return name in self._resolved or self._is_missing(name)

    def _is_missing(self, name: str) -> bool:
        """It is not loaded, or it is just being unloaded to make room."""
        if SEPARATOR in name:  # a tenant's own
            return False
        if self._registry.current(name) is not None and name not in self._evictions:
            return False
        try:
            self._registry.check_name(name)
        except BadRequest:
            return False
        return True

    def _is_loaded(self, name: str) -> bool:
        """Whether the resolver has loaded it, and nobody has unloaded or replaced it since."""
        resolved, current = self._resolved.get(name), self._registry.current(name)
        if resolved is None or current is None:
            return False
        return current.version == resolved.version and current.state is RefState.LOADED

    # ------------------------------------------------------------------ flights

    def _land(self, names: Sequence[str]) -> Steps[None]:
        """Wait for the flights of `names`, which are begun as far as there are none."""
        deadline = time.monotonic() + self._config.lora_resolver_timeout
        if names and self._num_waiting >= self._config.max_queued_requests:
            raise QueueFull(f"{self._num_waiting} requests wait for adapters that are being fetched; try again later")
        self._num_waiting += 1
        try:
            rest = iter(names)
            while some := list(islice(rest, FLIGHTS_AT_ONCE)):
                yield from self._fly_together(some, deadline)
        finally:
            self._num_waiting -= 1

    def _fly_together(self, names: Sequence[str], deadline: float) -> Steps[None]:
        """Wait for the flights of some names. Whoever leaves because its client is gone ends those that nobody else
        waits for; whoever got an error may come back, and counts as waiting."""
        flights: list[tuple[str, _NameFlight]] = []
        try:
            for name in names:
                flight = yield from self._board(name)
                if flight is not None:
                    flight.waiting += 1
                    flights.append((name, flight))
            for name, flight in flights:
                yield from WaitUntilDone(flight, max(0.0, deadline - time.monotonic()))
                if not flight.done:
                    raise QueueFull(f"adapter {name!r} is still being fetched; try again later")
                if flight.error is not None:
                    raise _copy(flight.error)
        except MultiloraError:
            raise
        except BaseException:
            for name, flight in flights:
                flight.waiting -= 1
                self._cancel_unwanted(name, flight)
            raise

    def _cancel_unwanted(self, name: str, flight: "_NameFlight") -> None:
        if flight.waiting == 0 and not flight.done:
            logger.info("adapter %r is not fetched any more: nobody waits for it", name)
            self._depart(name, flight)
            flight.cancel()

    def _depart(self, name: str, flight: "_NameFlight") -> None:
        """Whoever asks for the name from now on needs another flight."""
        if self._flights.get(name) is flight:
            del self._flights[name]

    def _board(self, name: str) -> Steps["_NameFlight | None"]:
        """The flight of `name`, which may begin now; None: it is known not to be there."""
        flight = self._flights.get(name)
        if flight is not None:
            return flight
        absent = self._absent.get(name)
        if absent is not None and time.monotonic() < absent.until:
            if absent.error is not None:
                raise _copy(absent.error)
            return None
        if len(self._flights) >= MAX_FLIGHTS:
            raise QueueFull(f"{MAX_FLIGHTS} adapters are being fetched already; try again later")
        flight = self._flights[name] = _NameFlight()
        yield from Spawn(self._fly(name, flight), flight)
        return flight

    def _fly(self, name: str, flight: "_NameFlight") -> Steps[None]:
        try:
            event = "hit" if (yield from self._load(name)) else "miss"
            if event == "miss":
                self._remember_absent(name, None)
        except MultiloraError as e:
            event, flight.error = "failure", e
            if not isinstance(e, QueueFull | EngineDead):
                self._remember_absent(name, e)
            logger.warning("adapter %r was asked for and cannot be loaded: %s", name, e)
        except BaseException:
            flight.error = MultiloraError(f"adapter {name!r} could not be loaded")
            raise
        finally:
            self._depart(name, flight)
            flight.finish()
        self._observer.resolved(event)

    def _load(self, name: str) -> Steps[bool]:
        """Find and load it. False: it is nowhere."""
        if name in self._evictions:
            yield from WaitUntilDone(self._evictions[name], self._config.lora_load_timeout)
        found = yield from self._fetcher.find(name)
        if found is None:
            logger.info("adapter %r was asked for and is in no place of --lora-resolver-…", name)
            return False
        try:
            yield from self._make_room(found)
        except BaseException:
            self._fetcher.discard(found)
            raise
        resolved = self._resolved[name] = _Resolved(found.nbytes)
        try:
            info = yield from self._manager.load_found(name, found)
        except BaseException:
            if self._resolved.get(name) is resolved:
                del self._resolved[name]
            if self._registry.current(name) is not None:  # a client has loaded it meanwhile
                return True
            raise
        resolved.version = info.version
        return True

    def _remember_absent(self, name: str, error: MultiloraError | None) -> None:
        self._absent.pop(name, None)
        self._absent[name] = _Absent(time.monotonic() + ABSENT_SECONDS, error)
        while len(self._absent) > MAX_ABSENT:
            self._absent.popitem(last=False)

    # ------------------------------------------------------------------ quotas

    def _make_room(self, found: Found) -> Steps[None]:
        """Unload what the quotas have no room for beside `found`. Raises QueueFull if all of it is in use."""
        while not self._has_room(found.nbytes):
            victim = next(self._victims(), None)
            if victim is not None:
                eviction = self._evictions[victim] = Flight()  # now: the work begins when others had their turns
                yield from CarryThrough(self._evict(victim, eviction))
            elif self._evictions:  # for other adapters, which may not need all of the room
                yield from WaitUntilDone(next(iter(self._evictions.values())), self._config.lora_load_timeout)
            else:
                raise QueueFull("every adapter that the resolver has loaded is in use; try again later")

    def _evict(self, victim: str, eviction: Flight) -> Steps[None]:
        try:
            yield from self._manager.unload_resolved(victim)
        finally:
            self._resolved.pop(victim, None)
            del self._evictions[victim]
            eviction.finish()
        self._observer.resolved("eviction")

    def _has_room(self, nbytes: int) -> bool:
        """Forgets what has been unloaded or replaced since the resolver has loaded it."""
        for name, resolved in list(self._resolved.items()):
            current = self._registry.current(name)
            if resolved.version is not None and (current is None or current.version != resolved.version):
                del self._resolved[name]
        total = sum(resolved.nbytes for resolved in self._resolved.values())
        few = len(self._resolved) < self._config.max_resolved_loras
        return few and total + nbytes <= self._config.lora_resolver_bytes

    def _victims(self) -> Iterator[str]:
        """What may be unloaded, the least recently used first: no request and no composition has it."""
        parts = {name for ref in self._registry.refs() for name, _ in ref.parts}
        for name in self._resolved:
            ref = self._registry.current(name)
            idle = self._is_loaded(name) and ref is not None and ref.num_requests == 0 and name not in self._evictions
            if idle and not self._wanted[name] and name not in parts and not self._registry.is_loading(name):
                yield name


def _copy(error: MultiloraError) -> MultiloraError:
    """The error for one more request."""
    return from_wire(error.kind, error.message)
