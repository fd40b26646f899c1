"""uvicorn as a front process runs it: its settings, and the event loop that they are for.

uvloop and httptools are dependencies where they exist (not on Windows, not with PyPy); elsewhere asyncio's own loop
and h11 do the same, slower.
"""

import asyncio
import contextlib
import gc
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import uvicorn

from multilora.config import Config
from multilora.errors import ConfigError
from multilora.server.chunk_writer import OffersChunkWriter
from multilora.server.connections import AbsoluteTargets, bounded_protocol

KEEP_ALIVE_SECONDS = 60
WRITE_SECONDS = 3
"""For the endings of requests that are cut off, until connections are closed."""
NO_TLS: Mapping[str, Any] = MappingProxyType({})


class QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before what it owes others is done.
    on_started: called once connections are taken."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None] = lambda: None):
        super().__init__(config)
        self.on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()


def event_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the event loop of a front process: uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def freeze_objects() -> None:
    """Have the garbage collector leave alone what exists now, as it stays: to look at all of a front's objects takes
    0.2 s, in which nobody is served."""
    gc.collect()
    gc.freeze()


def tls_settings(config: Config) -> dict[str, Any]:
    """uvicorn's settings for TLS, empty without --ssl-certfile. Raises ConfigError for files that do not work."""
    if config.ssl_certfile is None:
        if config.ssl_keyfile or config.ssl_ca_certs:
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs: only together with --ssl-certfile")
        return {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # without a password the library would ask for one on the terminal
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, config.ssl_keyfile_password or "")
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except OSError as e:
        raise ConfigError(f"--ssl-certfile, --ssl-keyfile or --ssl-ca-certs cannot be used: {e}") from None
    return {
        "ssl_certfile": config.ssl_certfile,
        "ssl_keyfile": config.ssl_keyfile,
        "ssl_keyfile_password": config.ssl_keyfile_password,
        "ssl_ca_certs": config.ssl_ca_certs,
        "ssl_cert_reqs": ssl.CERT_NONE if config.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    }


def uvicorn_config(
    app: Any, max_connections: int, drain_seconds: int | None = None, tls: Mapping[str, Any] = NO_TLS
) -> uvicorn.Config:
    """The settings for an application that is served on a socket which is there already. drain_seconds: how long
    running requests may still take when the server stops; None: as long as they like. tls: see `tls_settings`."""
    return uvicorn.Config(
        OffersChunkWriter(AbsoluteTargets(app)),
        http=bounded_protocol(max_connections),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
        **tls,
    )
