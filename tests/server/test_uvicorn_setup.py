"""How uvicorn is run: on uvloop and httptools where they exist, with the limits of `server/connections.py`."""

import asyncio
import builtins
import importlib.util

import pytest
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from multilora.server.connections import BoundedProtocol
from multilora.server.uvicorn_setup import event_loop, uvicorn_config


def kind_of_loop() -> str:
    with asyncio.Runner(loop_factory=event_loop()) as runner:
        return type(runner.get_loop()).__module__


@pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop does not exist here")
def test_the_loop_is_uvloops_where_it_is_installed():
    assert kind_of_loop().startswith("uvloop")


def test_without_uvloop_the_loop_is_asyncios(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "uvloop":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert kind_of_loop().startswith("asyncio")


@pytest.mark.skipif(importlib.util.find_spec("httptools") is None, reason="httptools does not exist here")
def test_requests_are_parsed_by_httptools():
    assert "httptools" in AutoHTTPProtocol.__module__


def test_the_settings():
    config = uvicorn_config(None, 7, 3)
    assert issubclass(config.http, BoundedProtocol)
    assert config.http.max_connections == 7 and config.timeout_graceful_shutdown == 3
    assert not config.access_log and config.lifespan == "off"
