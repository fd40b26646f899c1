"""`multilora serve`: engine up, adapters in, HTTP on, until a signal; then everything in the opposite order.

Owns the process: its port (taken first, so that a taken one is known before a model is loaded), its signals and its
exit code: 0 after a signal, 2 for a wrong argument, 1 for anything else that kept it from starting or running.
Called by `__main__.py`.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from multilora.config import Config
from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import ConfigError, MultiloraError
from multilora.front.state_directory import open_state
from multilora.front.tokenizer import Tokenizer
from multilora.models.gguf import with_directory
from multilora.server.app import create_app
from multilora.server.connections import connections_within, raise_descriptor_limit
from multilora.server.key_ring import KeyRing
from multilora.server.one_process import HttpFace, OneProcess
from multilora.server.server_info import SECRETS
from multilora.server.text import load_text
from multilora.server.tracing.exporter import SpanExporter
from multilora.server.uvicorn_setup import event_loop, freeze_objects, tls_settings
from multilora.server.workers.pool import FrontWorkers

logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that wait to be taken; as uvicorn's."""
HURRIED_WRITE_SECONDS = 0.5
"""For the endings of requests that are cut off by a second signal, until connections are closed."""
ENGINE_SECONDS = 5
"""For the engine, which has nothing to do any more, until it is killed."""


def serve(config: Config) -> int:
    """Run the server until SIGTERM or SIGINT. Returns the exit code."""
    try:
        config = with_directory(config)
        with asyncio.Runner(loop_factory=event_loop()) as runner:
            return runner.run(_ServerProcess(config).run())
    except asyncio.CancelledError:
        logger.info("stopped before the server was ready")
        return 0
    except ConfigError as e:
        logger.error("cannot start: %s", e)
        return 2
    except MultiloraError as e:
        logger.error("cannot start: %s: %s", e.kind, e)
        return 1


class _ServerProcess:
    def __init__(self, config: Config):
        self._config = config
        self._records, self._spool = open_state(config.state_dir)
        self._keys = KeyRing(config)
        self._tls = tls_settings(config)
        self._traces = SpanExporter.of(config)
        self._face: HttpFace | None = None
        self._driver: AsyncDriver | None = None
        self._main: asyncio.Task[Any] | None = None
        self._draining = self._hurried = False  # by a signal, by a second one
        self._descriptors = 0  # that the process may have

    async def run(self) -> int:
        from multilora.engine.process.supervisor import EngineSupervisor

        self._main = asyncio.current_task()
        self._descriptors = raise_descriptor_limit()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)
        if self._keys.tenants:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload_keys)
        _log_arguments(self._config)
        with bind(self._config.host, self._config.port) as listener:
            loading = asyncio.create_task(asyncio.to_thread(load_text, self._config))
            try:
                client = await EngineSupervisor.start(self._spool.admit(self._config))
            except BaseException:
                await asyncio.gather(loading, return_exceptions=True)
                raise
            if self._traces is not None:
                client.on_spans = self._traces.export_all
            try:
                await self._serve(client, listener, *await loading)
            finally:
                alive = client.alive or self._hurried
                await client.shutdown(0 if self._hurried else ENGINE_SECONDS)
                self._spool.close()
                self._records.close()
                if self._traces is not None and not self._hurried:
                    self._traces.close()
        logger.info("stopped")
        return 0 if alive else 1

    async def _serve(
        self, client: Any, listener: socket.socket, tokenizer: Tokenizer | None, defaults: dict[str, Any]
    ) -> None:
        config = self._config
        app = create_app(config, client, tokenizer, defaults, self._spool, self._records, self._keys, self._traces)
        driver: AsyncDriver = app.state.driver
        self._driver = driver
        await driver.change(driver.front.load_at_start())
        self._face = face = self._face_of(app, listener, driver)
        host, port = listener.getsockname()[:2]
        scheme = "https" if self._tls else "http"
        url = f"{scheme}://[{host}]" if ":" in host else f"{scheme}://{host}"
        freeze_objects()
        try:
            await face.serve(lambda: logger.info("ready: %s:%d", url, port))
        finally:
            app.state.bodies.process.close()

    def _face_of(self, app: Any, listener: socket.socket, driver: AsyncDriver) -> HttpFace:
        config, most = self._config, self._max_connections()
        if config.front_workers == 1:
            app.state.bodies.process.start()  # ahead of the first large body
            return OneProcess(app, listener, config, self._tls, most)
        return FrontWorkers(self._spool.admit(config), app, listener, driver, app.state.metrics, most)

    def _max_connections(self) -> int:
        return self._config.max_connections or connections_within(self._descriptors)

    def _reload_keys(self) -> None:
        self._keys.reload()
        if self._face is not None:
            self._face.reload_keys()

    def _signalled(self, number: int) -> None:
        """First: end downloads, and drain or give up starting. Second: end everything that is there at once."""
        logger.info("%s received", signal.Signals(number).name)
        self._spool.downloads.close()
        if self._face is None or self._driver is None:
            if self._main is not None:
                self._main.cancel()
        elif not self._draining:
            self._draining = True
            self._face.drain()
            if self._driver.front.pauses.paused:  # what is frozen would never finish
                self._driver.front.abort(None, "the server was shut down while it was paused")
            asyncio.get_running_loop().call_later(self._config.drain_seconds, self._driver.stop)
        else:
            self._hurried = True
            self._driver.stop()
            self._driver.engine.end("the server was told twice to stop")
            asyncio.get_running_loop().call_later(HURRIED_WRITE_SECONDS, self._face.close_connections)


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """The address, listened to at once: until then another process could take it, too, and two servers would load a
    model for one port. Connections that come while ours is loaded wait for it. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        # asyncio sets TCP_NODELAY on connections of this protocol only, not of protocol 0
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as e:
            raise ConfigError(f"--host {host} --port {port}: {os.strerror(e.errno or 0)}") from None
        yield listener


def _log_arguments(config: Config) -> None:
    """What was set, as one line; keys are not shown."""
    fields = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config)}
    shown = {k: "***" if k in SECRETS else v for k, (v, default) in fields.items() if v != default}
    if config.lora_paths:
        shown["lora_paths"] = [p.lora_name for p in config.lora_paths[:8]] + ["…"] * (len(config.lora_paths) > 8)
    if config.admin_api_key is not None and config.api_key is None and config.auth_file is None:
        logger.warning("--admin-api-key without --api-key: whoever reaches the server may generate")
    logger.info("arguments: %s", ", ".join(f"{k}={v!r}" for k, v in shown.items()) or "none, all defaults")
