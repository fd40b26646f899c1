"""An engine in the caller's process, stepped by hand: what `client.py` is to an engine in another process.

Owns who gets which answer: each request's outputs and each call's reply go to the function that was given with it.
Not thread-safe.
"""

import itertools
import select
from collections.abc import Callable
from functools import cached_property

from multilora.engine.engine import Engine
from multilora.engine.messages import (
    Abort,
    Finish,
    LoadAdapter,
    Output,
    Outputs,
    Ready,
    Reply,
    Stats,
    Submit,
    ToEngine,
    UnloadAdapter,
    UseTokenizer,
)


class LocalEngine:
    """`step` hands out what the engine says; nothing happens between steps."""

    alive = True  # it ends with this process
    restarting = False
    restarts = 0

    def __init__(self, engine: Engine):
        self.engine = engine
        self._receivers: dict[str, Callable[[Output], None]] = {}  # by rid
        self._callers: dict[int, Callable[[Reply], None]] = {}  # by the number of the call
        self._calls = itertools.count(1)

    @cached_property
    def ready(self) -> Ready:
        return self.engine.ready()

    @property
    def stats(self) -> Stats:
        return self.engine.report.stats()

    @property
    def calling(self) -> bool:
        """Whether a call has no reply yet."""
        return bool(self._callers)

    def submit(self, message: Submit, deliver: Callable[[Output], None]) -> None:
        """`deliver` gets the request's outputs; the last one has `finished`."""
        self._receivers[message.rid] = deliver
        self.engine.handle(message)

    def abort(self, rid: str, message: str = "aborted") -> None:
        """The request's last Output will say `abort`. A rid that is unknown or has ended is ignored."""
        if rid in self._receivers:
            self.engine.handle(Abort(rid, message))

    def finish(self, rid: str) -> None:
        """Nothing more is wanted, no Output follows."""
        if self._receivers.pop(rid, None) is not None:
            self.engine.handle(Finish(rid))

    def use_tokenizer(self, info: str) -> None:
        """What grammars are bound to: xgrammar's serialized TokenizerInfo."""
        self.engine.handle(UseTokenizer(info))

    def load_adapter(self, version: int, path: str, pinned: bool, answer: Callable[[Reply], None]) -> None:
        """Begin the load; a later step calls `answer`."""
        self.begin_call(lambda call: LoadAdapter(call=call, version=version, path=path, pinned=pinned), answer)

    def unload_adapter(self, version: int, answer: Callable[[Reply], None]) -> None:
        """Begin the unload; a later step calls `answer`."""
        self.begin_call(lambda call: UnloadAdapter(call, version), answer)

    def begin_call(self, message: Callable[[int], ToEngine], answer: Callable[[Reply], None]) -> None:
        """Begin the call whose message is made of its number; a later step calls `answer`."""
        call = next(self._calls)
        self._callers[call] = answer
        self.engine.handle(message(call))

    def forget_calls(self) -> None:
        """Nobody waits for the replies to calls so far any more: the work that made them was interrupted."""
        self._callers.clear()

    def step(self) -> None:
        """One step of the engine. Where there is nothing to compute, wait a millisecond."""
        messages = self.engine.step()
        if not messages and not self.engine.running:
            self._wait(ms=1)  # something is on its way from the loader, or to the device
        for message in messages:
            match message:
                case Outputs(items):
                    for output in items:
                        self._deliver(output)
                case Reply() if message.call in self._callers:
                    self._callers.pop(message.call)(message)

    def _deliver(self, output: Output) -> None:
        deliver = self._receivers.get(output.rid)
        if deliver is not None:  # else the front has finished it
            if output.finished is not None:
                del self._receivers[output.rid]
            deliver(output)

    def _wait(self, ms: int) -> None:
        """Less if the loader says something."""
        poller = select.poll()
        loader = self.engine.adapters.fileno()
        if loader is not None:
            poller.register(loader, select.POLLIN)
        poller.poll(ms)
