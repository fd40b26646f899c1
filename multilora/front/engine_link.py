"""What the front says to an engine, wherever it runs: messages that need no answer, in the order they are given."""

from collections.abc import Callable
from typing import Protocol

from multilora.engine.messages import Output, Ready, Stats, Submit


class RequestLink(Protocol):
    """What the requests of one front need of the engine. `ready`: as it said at its start. No method waits for it."""

    @property
    def ready(self) -> Ready: ...

    def submit(self, message: Submit, deliver: Callable[[Output], None]) -> None:
        """`deliver` gets each Output of that rid; the last has `finished` (type error, kind EngineDead, if the
        engine dies for good). One with `again` says that all before it is void."""

    def abort(self, rid: str, message: str = "aborted") -> None:
        """The request's last Output will say `abort`. A rid that is unknown or has ended is ignored."""

    def finish(self, rid: str) -> None:
        """A stop string matched in the front: the request is over, no Output follows."""

    def use_tokenizer(self, info: str) -> None:
        """xgrammar's serialized TokenizerInfo; before the first Submit with a grammar."""


class EngineLink(RequestLink, Protocol):
    """`stats`: the latest; `alive`: False once the engine has ended for good; `restarting`: it has ended, and another
    one is coming; `restarts`: how often that was so."""

    @property
    def stats(self) -> Stats: ...

    @property
    def alive(self) -> bool: ...

    @property
    def restarting(self) -> bool: ...

    @property
    def restarts(self) -> int: ...
