"""`multilora serve`: engine up, adapters in, HTTP on, until a signal; then everything in the opposite order.

Owns the process: its port (taken first, so that a taken one is known before a model is loaded), its signals and its
exit code: 0 after a signal, 2 for a wrong argument, 1 for anything else that kept it from starting or running.
Called by `__main__.py`.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from multilora.config import Config
from multilora.demo import base_model_path
from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import ConfigError, MultiloraError
from multilora.front.state_directory import open_state
from multilora.front.tokenizer import Tokenizer
from multilora.models.gguf import with_directory
from multilora.server.app import create_app
from multilora.server.connections import connections_within, raise_descriptor_limit
from multilora.server.key_ring import KeyRing
from multilora.server.server_info import SECRETS
from multilora.server.tracing.exporter import SpanExporter
from multilora.server.uvicorn_setup import event_loop, tls_settings, uvicorn_config

logger = logging.getLogger(__name__)

WRITE_SECONDS = 3
"""For the endings of requests that are cut off, until connections are closed."""
HURRIED_WRITE_SECONDS = 0.5
"""The same after a second signal."""
ENGINE_SECONDS = 5
"""For the engine, which has nothing to do any more, until it is killed."""
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


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


class _UvicornServer(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before the engine is stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _ServerProcess:
    def __init__(self, config: Config):
        self._config = config
        self._records, self._spool = open_state(config.state_dir)
        self._keys = KeyRing(config)
        self._tls = tls_settings(config)
        self._traces = SpanExporter.of(config)
        self._server: _UvicornServer | None = None
        self._driver: AsyncDriver | None = None
        self._main: asyncio.Task[Any] | None = None
        self._hurried = False  # by a second signal
        self._descriptors = 0  # that the process may have

    async def run(self) -> int:
        from multilora.engine.process.supervisor import EngineSupervisor

        self._main = asyncio.current_task()
        self._descriptors = raise_descriptor_limit()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)
        if self._keys.tenants:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._keys.reload)
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
        self._server = _UvicornServer(
            uvicorn_config(app, self._max_connections(), config.drain_seconds + WRITE_SECONDS, self._tls)
        )
        host, port = listener.getsockname()[:2]
        scheme = "https" if self._tls else "http"
        logger.info("ready: %s:%d", f"{scheme}://[{host}]" if ":" in host else f"{scheme}://{host}", port)
        await self._server.serve(sockets=[listener])

    def _max_connections(self) -> int:
        return self._config.max_connections or connections_within(self._descriptors)

    def _signalled(self, number: int) -> None:
        """First: end downloads, and drain or give up starting. Second: end everything that is there at once."""
        logger.info("%s received", signal.Signals(number).name)
        self._spool.downloads.close()
        if self._server is None or self._driver is None:
            if self._main is not None:
                self._main.cancel()
        elif not self._server.should_exit:
            self._server.should_exit = True
            if self._driver.front.pauses.paused:  # what is frozen would never finish
                self._driver.front.abort(None, "the server was shut down while it was paused")
            asyncio.get_running_loop().call_later(self._config.drain_seconds, self._driver.stop)
        else:
            self._hurried = True
            self._driver.stop()
            self._driver.engine.end("the server was told twice to stop")
            asyncio.get_running_loop().call_later(HURRIED_WRITE_SECONDS, self._close_connections)

    def _close_connections(self) -> None:
        """Clients that do not read hold up nobody."""
        assert self._server is not None
        for task in self._server.server_state.tasks:
            task.cancel()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """The address, taken but not listened to yet. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        # asyncio sets TCP_NODELAY on connections of this protocol only, not of protocol 0
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as e:
            raise ConfigError(f"--host {host} --port {port}: {os.strerror(e.errno or 0)}") from None
        yield listener


def load_text(config: Config) -> tuple[Tokenizer | None, dict[str, Any]]:
    """The tokenizer, and the sampling defaults of the model's generation_config. Raises ConfigError."""
    defaults = sampling_defaults(config.model_path or str(base_model_path()), config.revision)
    return Tokenizer.of(config), defaults


def sampling_defaults(model: str, revision: str | None) -> dict[str, Any]:
    """What `generation_config.json` says of sampling, in our words; empty if the model has none."""
    name = "generation_config.json"
    if Path(model).is_dir():
        path = Path(model) / name
        if not path.exists():
            return {}
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(model, name, revision=revision))
        except EntryNotFoundError:
            return {}
        except (OSError, ValueError) as e:
            raise ConfigError(f"--model-path {model!r} is neither a directory nor a hub repository: {e}") from e
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    defaults = {key: found[key] for key in _DEFAULTS if found.get(key) is not None}
    if defaults.get("top_k") == 0:  # transformers' word for "all"
        defaults["top_k"] = -1
    return defaults


def _log_arguments(config: Config) -> None:
    """What was set, as one line; keys are not shown."""
    fields = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config)}
    shown = {k: "***" if k in SECRETS else v for k, (v, default) in fields.items() if v != default}
    if config.lora_paths:
        shown["lora_paths"] = [p.lora_name for p in config.lora_paths[:8]] + ["…"] * (len(config.lora_paths) > 8)
    if config.admin_api_key is not None and config.api_key is None and config.auth_file is None:
        logger.warning("--admin-api-key without --api-key: whoever reaches the server may generate")
    logger.info("arguments: %s", ", ".join(f"{k}={v!r}" for k, v in shown.items()) or "none, all defaults")
