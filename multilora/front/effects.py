"""What the front asks of its driver: effects, yielded by generators that get the results sent back.

The front does no I/O. A change of an adapter or the start of a request is a generator of type `Steps`: it yields an
effect wherever it needs the engine, a file, a long computation or to wait, and goes on with the result:

    info = yield from EngineLoad(version, path, pinned)

A driver performs the effects (package `drivers`): by asyncio, or by stepping an engine in the same process. An effect
that fails raises its error at that line; so does the cancellation of the work.
"""

import enum
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from multilora.engine.messages import AdapterInfo, Reply, ToEngine
from multilora.errors import MultiloraError
from multilora.front.grammars.compiler import Setup

T = TypeVar("T")


class Effect(Generic[T]):
    """One thing for the driver to do, with a result of type T."""

    def __iter__(self) -> Generator["Effect[Any]", Any, T]:
        result: T = yield self
        return result


Steps = Generator[Effect[Any], Any, T]
"""Work of the front under way, with a result of type T in the end."""


class Lane(enum.Enum):
    """Who waits for whom: blocking work of one lane runs on a bounded number of threads of its own."""

    TEXT = "text"  # tokenizing and chat templates
    LONG_TEXT = "long text"
    FILES = "files"  # the disk
    TENSORS = "tensors"  # the disk too, for adapters in the body of a request
    STATE = "state"  # the records of --state-dir, one change after the other
    HUB = "hub"  # the network: a host that never answers keeps waiting only what comes by the same scheme
    HTTP = "http"
    S3 = "s3"
    GS = "gs"


@dataclass(frozen=True)
class RunBlocking(Effect[T]):
    """Call `function` where it holds up nobody: it computes for long, or waits for a disk or the network.

    If the work is cancelled meanwhile: `stop` makes the function end soon; `undo` is given its result if there is one
    all the same. Both may be called on any thread.
    """

    lane: Lane
    function: Callable[[], T]
    stop: Callable[[], None] | None = None
    undo: Callable[[T], object] | None = None


@dataclass(frozen=True)
class CompiledText:
    """A grammar as `Submit.grammar` wants it, and what it is bound to: xgrammar's TokenizerInfo as JSON."""

    text: str
    tokenizer_info: str


@dataclass(frozen=True)
class CompileGrammar(Effect[CompiledText]):
    """Compile `source`, a grammar of the kind that `field` holds, where it can be stopped.

    Raises BadRequest, also when it takes too much time or memory; QueueFull when too many others wait.
    """

    setup: Setup
    field: str
    source: str


@dataclass(frozen=True)
class EngineLoad(Effect[AdapterInfo]):
    """Have the engine load the adapter at `path` as `version`. Raises AdapterError or EngineDead."""

    version: int
    path: str
    pinned: bool


@dataclass(frozen=True)
class EngineUnload(Effect[None]):
    """Have the engine forget `version`, which no request holds. Raises EngineDead."""

    version: int


@dataclass(frozen=True)
class EngineCall(Effect[Reply]):
    """Have the engine perform the call that `message` makes of its number. Raises its typed error, or EngineDead."""

    message: Callable[[int], ToEngine]


@dataclass(frozen=True)
class Ask(Effect[T]):
    """Ask the process that holds the registry what `question` makes of the call's number; the result is its answer.
    Raises its typed error. `undo` is given the answer if the work is cancelled meanwhile."""

    question: Callable[[int], Any]
    undo: Callable[[T], object]


@dataclass(frozen=True)
class WaitUntilIdle(Effect[None]):
    """Wait until no request holds `version`."""

    version: int


class Flight:
    """Work under way that others wait for. `error`: what it failed with, once it is done. `cancel`: ends the work
    soon, on a driver of requests that run side by side."""

    def __init__(self) -> None:
        self.done = False
        self.error: MultiloraError | None = None
        self.cancel: Callable[[], object] = lambda: None
        self._callbacks: list[Callable[[], None]] = []

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the flight has ended: at once if it has."""
        if self.done:
            callback()
        else:
            self._callbacks.append(callback)

    def finish(self) -> None:
        """The flight has ended; whoever waits goes on."""
        self.done = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


@dataclass(frozen=True)
class WaitUntilDone(Effect[None]):
    """Wait until the flight has ended, or for `seconds` on a driver of requests that run side by side."""

    flight: Flight
    seconds: float


@dataclass(frozen=True)
class Within(Effect[T]):
    """Run `steps`; on a driver of requests that run side by side for `seconds` at most, then they are cancelled and
    `error` is raised."""

    steps: Steps[T]
    seconds: float
    error: MultiloraError


@dataclass(frozen=True)
class CarryThrough(Effect[T]):
    """Run `steps` to their end, even if the work that waits for them is cancelled meanwhile."""

    steps: Steps[T]


@dataclass(frozen=True)
class Gather(Effect[list[T | BaseException]]):
    """Run `children` side by side, at most `limit` at a time. The results, or errors, in their order."""

    children: Sequence[Steps[T]]
    limit: int


@dataclass(frozen=True)
class Spawn(Effect[None]):
    """Start `steps` and go on at once; an error of theirs is logged. flight: what they are, whose `cancel` is set."""

    steps: Steps[None]
    flight: Flight | None = None
