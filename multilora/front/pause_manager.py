"""Pausing generation and putting the engine to sleep, without I/O: calls to the engine, and what it said last.

One `PauseManager` per front. The engine itself refuses requests while a pause takes none, so that none can slip in
between. A change is work for a driver (see `effects.py`).
"""

import logging
from collections.abc import Collection, Sequence
from typing import get_args

from multilora.engine.messages import (
    FlushCache,
    MemoryTag,
    Pause,
    PauseMode,
    PauseState,
    Reply,
    Resume,
    Sleep,
    WakeUp,
)
from multilora.errors import BadRequest
from multilora.front.effects import EngineCall, Steps

logger = logging.getLogger(__name__)

MODES: tuple[PauseMode, ...] = get_args(PauseMode)
TAGS: tuple[MemoryTag, ...] = get_args(MemoryTag)
WORDS = ("cuda_graph", "scheduling")
"""Tags of the peers that name nothing of its own here: graphs go and come with what they read, and scheduling goes on
once everything is back."""


class PauseManager:
    """`state`: as the engine said when it answered the last call."""

    def __init__(self) -> None:
        self.state = PauseState()

    @property
    def paused(self) -> bool:
        return self.state.mode is not None

    def pause(self, mode: str = "abort", *, clear_cache: bool = False, queues: bool | None = None) -> Steps[None]:
        """Stop generating, and wait until the engine is at rest. Idempotent. Raises BadRequest, EngineDead.

        mode: what becomes of the requests that are there, see `PauseMode`. clear_cache: drop the prefix cache, unless
        requests keep their place in it. queues: whether requests that come meanwhile wait; None: with "keep" and
        "retract", as in vLLM.
        """
        found = _mode(mode)
        waits = found in ("keep", "retract") if queues is None else queues
        self._take((yield from EngineCall(lambda call: Pause(call=call, mode=found, queues=waits))))
        logger.info("generation paused (%s)", found)
        if clear_cache and found != "keep":
            yield from self.flush()

    def resume(self) -> Steps[None]:
        """Generate again. Idempotent. Raises BadRequest while the engine is asleep, EngineDead."""
        self._take((yield from EngineCall(Resume)))
        logger.info("generation resumed")

    def sleep(self, level: int = 1, mode: str | None = "abort", tags: Sequence[str] | None = None) -> Steps[None]:
        """Pause, and release memory of the device until `wake_up`: see `engine.messages.Sleep`. tags None: all.

        Raises BadRequest, EngineDead.
        """
        if level not in (0, 1, 2):
            raise BadRequest(f"level = {level}: must be 0, 1 or 2", param="level")
        found, wanted = None if mode is None else _mode(mode), _tags(tags)
        self._take((yield from EngineCall(lambda call: Sleep(call=call, level=level, tags=wanted, mode=found))))

    def wake_up(self, tags: Sequence[str] | None = None) -> Steps[bool]:
        """Take the memory again, and generate once nothing is missing. Returns whether the engine is awake.

        Raises BadRequest, OutOfMemory, ConfigError if discarded weights cannot be read again, EngineDead.
        """
        wanted = _tags(tags)
        self._take((yield from EngineCall(lambda call: WakeUp(call, wanted))))
        return not self.state.sleeping

    def flush(self, *, retract: bool = False) -> Steps[None]:
        """Drop the idle prefixes. retract: running requests are computed anew, so that every prefix goes."""
        yield from EngineCall(lambda call: FlushCache(call, retract))
        logger.info("prefix cache flushed")

    def _take(self, reply: Reply) -> None:
        assert reply.pause is not None
        self.state = reply.pause


def _mode(mode: str) -> PauseMode:
    for known in MODES:
        if mode == known:
            return known
    raise BadRequest(f"mode = {mode!r}: must be one of {', '.join(MODES)}", param="mode")


def _tags(tags: Collection[str] | None) -> list[MemoryTag]:
    """Raises BadRequest for a tag that is unknown."""
    if tags is None:
        return list(TAGS)
    for tag in tags:
        if tag not in (*TAGS, *WORDS):
            raise BadRequest(f"tags: {tag!r} is not one of {', '.join((*TAGS, *WORDS))}", param="tags")
    return [tag for tag in TAGS if tag in tags]
