"""uvicorn as a front process runs it: its settings, and the event loop that they are for.

uvloop and httptools are dependencies where they exist (not on Windows, not with PyPy); elsewhere asyncio's own loop
and h11 do the same, slower.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn

from multilora.server.chunk_writer import OffersChunkWriter
from multilora.server.connections import AbsoluteTargets, bounded_protocol

KEEP_ALIVE_SECONDS = 60


def event_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the event loop of a front process: uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def uvicorn_config(app: Any, max_connections: int, drain_seconds: int | None = None) -> uvicorn.Config:
    """The settings for an application that is served on a socket which is there already. drain_seconds: how long
    running requests may still take when the server stops; None: as long as they like."""
    return uvicorn.Config(
        OffersChunkWriter(AbsoluteTargets(app)),
        http=bounded_protocol(max_connections),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
    )
