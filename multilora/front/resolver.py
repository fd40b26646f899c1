"""Adapters that load themselves: what a request may ask for by name though nobody has loaded it, and how often.

`ResolverRules` says where an adapter of a name could be: below a directory or a URL of --lora-resolver-dir, or on the
hub where a pattern of --lora-resolver-hub allows it. `Resolutions` decides who looks: one flight per name at a time,
failures remembered for a while, each flight bounded in time, flights and resolved adapters bounded in number.
Both are pure: no file is touched and no clock is read here. The driver passes the time (seconds, any monotonic
clock), looks at the locations (`adapters/sources`), loads and unloads, and wakes those who wait.

    ask ─┬─ raises: unknown, failed a moment ago, or too much going on
         ├─ Wait: another request's flight; its end is this request's too
         └─ Start ─ the driver loads ─┬─ loaded: resolved, least recently used goes first when there are too many
                                      ├─ failed: remembered for a while
                                      └─ overdue: as failed; a load that comes in later is to be undone
"""

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from multilora.errors import AdapterError, ConfigError, MultiloraError, QueueFull, UnknownAdapter, from_wire

MAX_NAME = 256  # characters
MAX_PART = 255  # bytes of one directory's name
MAX_DEPTH = 8  # directories below the root
REMOTE_ROOT = re.compile(r"(s3|gs|https?)://[^\s/?#]+(/[^\s?#]*)?")
REMOTE_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)  # means the same in a URL and in a bucket's key
HUB_PATTERN = re.compile(r"[\w.*?-]+/[\w.*?-]+(@[\w.*?-]+)?", re.ASCII)


@dataclass(frozen=True)
class Location:
    """Where an adapter could be.

    `path`: a URL for the loader (`hf://ORG/NAME` for the hub, so that a directory of that name is never taken for
    it), or that of a directory, which must not lead out of `root`.
    """

    kind: Literal["directory", "remote", "hub"]
    path: str
    root: str = ""


class ResolverRules:
    """The places of --lora-resolver-dir (directories and s3, gs, http or https URLs) and --lora-resolver-hub."""

    def __init__(self, places: Sequence[str] = (), hub_patterns: Sequence[str] = ()):
        """Raises ConfigError for a URL of another kind and for a pattern that is not ORG/NAME with * and ?."""
        for place in places:
            if not place or ("://" in place and (REMOTE_ROOT.fullmatch(place) is None or "::" in place)):
                what = "a directory or an s3://, gs://, http:// or https:// URL"
                raise ConfigError(f"--lora-resolver-dir {place!r}: {what} is expected")
        self._places = tuple(places)
        self._hub = tuple(_hub_pattern(pattern) for pattern in hub_patterns)

    def __bool__(self) -> bool:
        """Whether anything can be resolved at all."""
        return bool(self._places or self._hub)

    def locations(self, name: str) -> list[Location]:
        """Where an adapter of this name could be, in the order in which to look. Empty: nowhere, by its form."""
        if not is_plain_path(name):
            return []
        found = []
        for place in self._places:
            if "://" not in place:
                found.append(Location("directory", f"{place.rstrip('/')}/{name}", place))
            elif REMOTE_NAME.fullmatch(name):
                found.append(Location("remote", f"{place.rstrip('/')}/{name}"))
        if any(pattern.fullmatch(name) for pattern in self._hub):
            found.append(Location("hub", f"hf://{name}"))
        return found


def is_plain_path(name: str) -> bool:
    """Whether a name, read as a relative path, goes only down: ordinary, visible names joined by single slashes.

    Refused are "", ".", ".." and hidden names (trainers write unfinished adapters under those), backslashes, control
    characters, characters that cannot be encoded, names that are not in Unicode's composed form (some file systems
    take several spellings for one name), and what is too long or too deep.
    """
    if not 1 <= len(name) <= MAX_NAME or "\\" in name or not name.isprintable():
        return False
    parts = name.split("/")
    if len(parts) > MAX_DEPTH or any(not part or part.startswith(".") or part != part.strip() for part in parts):
        return False
    try:
        too_long = any(len(part.encode()) > MAX_PART for part in parts)
    except UnicodeEncodeError:
        return False
    return not too_long and unicodedata.normalize("NFC", name) == name


def _hub_pattern(pattern: str) -> "re.Pattern[str]":
    """`*` and `?` stay within one part. A revision is allowed only where the pattern has one: anybody can open a pull
    request, which is a revision, on somebody else's repository."""
    if HUB_PATTERN.fullmatch(pattern) is None:
        raise ConfigError(f"--lora-resolver-hub {pattern!r}: ORG/NAME is expected, in which * and ? may stand")
    wild = {"*": r"[\w.-]*", "?": r"[\w.-]"}
    return re.compile("".join(wild.get(c, re.escape(c)) for c in pattern), re.ASCII)


@dataclass(frozen=True)
class ResolverLimits:
    """Seconds and counts. Looking into a directory again is cheap, asking the hub or a bucket again is not."""

    max_resolved: int = 1024  # adapters that are loaded because a request asked for them
    max_flights: int = 8
    time_limit: float = 120.0  # of one flight, download included
    directory_ttl: float = 1.0  # how long a failure is remembered if only directories were looked at
    remote_ttl: float = 30.0
    max_failures: int = 10_000  # remembered; clients choose the names


@dataclass(frozen=True)
class Start:
    """The caller loads `name` from the first of `locations` that has it, after unloading `evict`."""

    name: str
    locations: tuple[Location, ...]
    deadline: float
    evict: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wait:
    """Somebody else's flight for this name is under way."""

    name: str
    deadline: float


@dataclass(frozen=True)
class _Failure:
    kind: str
    message: str
    until: float

    def error(self) -> MultiloraError:
        """A new exception each time: one that was raised holds on to the stack it was raised in."""
        error = from_wire(self.kind, self.message)
        error.param = "model"
        return error


class Resolutions:
    """The state of all names that were ever asked for: in flight, resolved, failed a moment ago. Not thread-safe.

    Always len(flights) <= max_flights, len(flights) + len(resolved) <= max_resolved, and no name is in two states.
    """

    def __init__(self, rules: ResolverRules, limits: ResolverLimits | None = None):
        self._rules = rules
        self._limits = limits or ResolverLimits()
        self._flights: dict[str, Start] = {}
        self._resolved: dict[str, None] = {}  # least recently used first
        self._failures: dict[str, _Failure] = {}  # oldest first

    # ------------------------------------------------------------------ requests

    def ask(self, name: str, now: float, busy: Collection[str] = ()) -> Start | Wait:
        """A request names an adapter that is not loaded. `busy`: names of adapters that requests hold now.

        Raises UnknownAdapter when it can be nowhere, the error of a recent failure, and QueueFull when too many
        flights are under way or every resolved adapter is busy.
        """
        flight = self._flights.get(name)
        if flight is not None:
            return Wait(name, flight.deadline)
        locations = self._rules.locations(name)
        if not locations:
            raise unknown(name)
        failure = self._failures.get(name)
        if failure is not None and now < failure.until:
            raise failure.error()
        self._failures.pop(name, None)
        self._resolved.pop(name, None)  # it was unloaded behind our back
        if len(self._flights) >= self._limits.max_flights:
            raise QueueFull(f"adapter {name!r}: {len(self._flights)} adapters are being looked for already")
        start = Start(name, tuple(locations), now + self._limits.time_limit, self._victims(name, busy))
        for victim in start.evict:
            del self._resolved[victim]
        self._flights[name] = start
        return start

    def use(self, name: str) -> None:
        """A request uses an adapter; nothing happens if it was not resolved here."""
        if name in self._resolved:
            self._resolved[name] = self._resolved.pop(name)

    def _victims(self, name: str, busy: Collection[str]) -> tuple[str, ...]:
        excess = len(self._flights) + len(self._resolved) + 1 - self._limits.max_resolved
        if excess <= 0:
            return ()
        idle = [resolved for resolved in self._resolved if resolved not in busy]
        if len(idle) < excess:
            raise QueueFull(f"adapter {name!r}: all {self._limits.max_resolved} resolved adapters are in use")
        return tuple(idle[:excess])

    # ------------------------------------------------------------------ what came of it

    def loaded(self, name: str) -> bool:
        """The load went well. False: too late, its time was over; the driver unloads it."""
        if self._flights.pop(name, None) is None:
            return False
        self._resolved[name] = None
        return True

    def failed(self, name: str, error: MultiloraError, now: float) -> None:
        """The load failed; `error` is what those who wait get, and those who ask in the next seconds."""
        flight = self._flights.pop(name, None)
        if flight is not None:
            self._remember(flight, error, now)

    def dismiss(self, name: str) -> None:
        """The flight has ended without a result of its own: somebody loaded the adapter by hand meanwhile."""
        self._flights.pop(name, None)

    def overdue(self, now: float) -> dict[str, MultiloraError]:
        """The flights whose time is over end here, with these errors. To be called at `next_deadline`."""
        late = [flight for flight in self._flights.values() if flight.deadline <= now]
        errors: dict[str, MultiloraError] = {}
        for flight in late:
            errors[flight.name] = AdapterError(
                f"adapter {flight.name!r} could not be loaded within {self._limits.time_limit:g} s", param="model"
            )
            self.failed(flight.name, errors[flight.name], now)
        return errors

    def forget(self, name: str, now: float) -> None:
        """The adapter was unloaded by hand. Requests already on their way do not bring it back at once."""
        if name in self._resolved:
            del self._resolved[name]
            locations = tuple(self._rules.locations(name))
            self._remember(Start(name, locations, now), unknown(name), now)

    @property
    def next_deadline(self) -> float | None:
        return min((flight.deadline for flight in self._flights.values()), default=None)

    @property
    def resolved(self) -> tuple[str, ...]:
        """Names, least recently used first."""
        return tuple(self._resolved)

    @property
    def in_flight(self) -> tuple[str, ...]:
        return tuple(self._flights)

    def _remember(self, flight: Start, error: MultiloraError, now: float) -> None:
        limits = self._limits
        local = all(location.kind == "directory" for location in flight.locations)
        until = now + (limits.directory_ttl if local else limits.remote_ttl)
        while len(self._failures) >= limits.max_failures:
            del self._failures[next(iter(self._failures))]
        self._failures[flight.name] = _Failure(error.kind, error.message, until)


def unknown(name: str) -> UnknownAdapter:
    """What a request gets whose adapter is in none of the locations, the same whatever the reason."""
    message = f"adapter {name!r} has never been loaded, or was unloaded, and was not found"
    return UnknownAdapter(message, param="model")
