"""What an engine has been given and its successor must be given, too: requests, adapters, the tokenizer, a pause.

Owns who is told what when an engine ends. Used by one event loop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from multilora.engine.messages import (
    AdapterInfo,
    AdapterSwitch,
    Finished,
    Output,
    Pause,
    ReplaceAdapter,
    Reply,
    Resume,
    Sleep,
    Submit,
    ToEngine,
    WakeUp,
)
from multilora.errors import MultiloraError

MAX_RUNS = 2
"""How many engines a request or a call may see end before it ends, too: it may be what ends them."""


class OpenRequest:
    """A request without an ending. `started`: an Output of its latest run has been delivered."""

    __slots__ = ("_deliver", "_open", "message", "runs", "started")

    def __init__(self, message: Submit, deliver: Callable[[Output], None], open_: "dict[str, OpenRequest]"):
        self.message = message
        self.started = False
        self.runs = 0
        self._deliver = deliver
        self._open = open_

    def take(self, output: Output) -> None:
        """An Output from the engine. What is said when the engine is gone is not for the client yet."""
        if output.finished is not None:
            if output.finished.kind == "EngineDead" or self._open.get(output.rid) is not self:
                return
            del self._open[output.rid]
        elif output.switch is not None:
            self._replace(output.switch.old, output.switch.new)
        self.started = True
        self._deliver(output)

    def end(self, finished: Finished) -> None:
        """The one ending, in place of the engine's."""
        del self._open[self.message.rid]
        self._deliver(Output(rid=self.message.rid, finished=finished))

    def switch(self, old: int, new: int) -> None:
        """The request, which does not run, will run on another version of its adapter from its start."""
        self._replace(old, new)
        self._deliver(Output(rid=self.message.rid, switch=AdapterSwitch(0, old, new)))

    def _replace(self, old: int, new: int) -> None:
        adapters = tuple((new if version == old else version, weight) for version, weight in self.message.adapters)
        self.message = msgspec.structs.replace(self.message, adapters=adapters)

    def begin_again(self) -> None:
        """What has been delivered is void: the request runs again from its start."""
        if self.started:
            self.started = False
            self._deliver(Output(rid=self.message.rid, again=True))


@dataclass
class KeptAdapter:
    """A version that the engine has. `lost`: why the present engine does not have it, though it should."""

    info: AdapterInfo
    path: str
    pinned: bool
    lost: MultiloraError | None = None


class EngineBook:
    """`requests` by rid, `adapters` by version; `tokenizer`: xgrammar's TokenizerInfo, once it is known; `pauses`:
    the calls that lead a new engine to the state that this one is in."""

    def __init__(self) -> None:
        self.requests: dict[str, OpenRequest] = {}
        self.adapters: dict[int, KeptAdapter] = {}
        self.tokenizer: str | None = None
        self.pauses: list[Pause | Sleep | WakeUp] = []
        self._successors: dict[int, int] = {}  # of versions whose requests go on with another one

    def open(self, message: Submit, deliver: Callable[[Output], None]) -> OpenRequest:
        """Note a request, which has not been sent."""
        request = self.requests[message.rid] = OpenRequest(message, deliver, self.requests)
        return request

    def lost(self) -> list[int]:
        """Versions that the present engine lacks."""
        return [version for version, kept in self.adapters.items() if kept.lost is not None]

    def note_call(self, message: ToEngine, reply: Reply) -> None:
        """Note what a call has changed that outlasts an engine."""
        match message:
            case ReplaceAdapter(version=version, successor=successor):
                latest = {old: successor for old, new in self._successors.items() if new == version}
                self._successors |= latest | {version: successor}
            case Resume():
                self.pauses = []
            case WakeUp() if reply.pause is not None and not reply.pause.sleeping:
                self.pauses = [
                    kept for kept in self.pauses if isinstance(kept, Pause) and reply.pause.mode is not None
                ]
            case Pause() | Sleep() | WakeUp():
                self.pauses = [kept for kept in self.pauses if not _same(kept, message)] + [message]

    def remove_adapter(self, version: int) -> KeptAdapter | None:
        """The engine is to forget the version. None: it is not known here."""
        named = {version for request in self.requests.values() for version, _ in request.message.adapters}
        for old in [old for old in self._successors if old not in named and old not in self.adapters]:
            del self._successors[old]
        return self.adapters.pop(version, None)

    def interrupt(self, reason: str) -> None:
        """The engine has ended and another one is coming. Who has been told something hears of it at once; who has
        seen too many engines end gets an error."""
        for request in list(self.requests.values()):
            if request.runs >= MAX_RUNS:
                text = f"{reason}, and so did the one before it while this request was there"
                request.end(Finished(type="error", kind="EngineDead", message=text))
            else:
                request.begin_again()
                self._switch(request)

    def _switch(self, request: OpenRequest) -> None:
        """It was on a version that has been replaced by then: the next engine may not have that one any more."""
        for old, _ in request.message.adapters:
            if old in self._successors:
                request.switch(old, self._successors[old])

    def end_all(self, reason: str) -> None:
        """There will be no engine any more."""
        for request in list(self.requests.values()):
            request.end(Finished(type="error", kind="EngineDead", message=reason))


def _same(one: ToEngine, other: ToEngine) -> bool:
    """The same call, but for its number."""
    fields = [name for name in one.__struct_fields__ if name != "call"]
    return type(one) is type(other) and all(getattr(one, name) == getattr(other, name) for name in fields)
