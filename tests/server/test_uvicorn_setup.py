"""How uvicorn is run: on uvloop and httptools where they exist, with the limits of `server/connections.py`."""

import asyncio
import builtins
import contextlib
import gc
import importlib.util
import socket
import ssl
from pathlib import Path

import pytest
import uvicorn
from certificates import make_certificate
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from multilora.config import Config
from multilora.errors import ConfigError
from multilora.server.connections import BoundedProtocol
from multilora.server.uvicorn_setup import event_loop, freeze_objects, tls_settings, uvicorn_config


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


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem with key.pem, and with locked.pem, whose password is "word"."""
    path = tmp_path_factory.mktemp("tls")
    make_certificate(path)
    return path


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


async def ask(settings: dict[str, object], client: ssl.SSLContext) -> bytes:
    """What a server with these settings answers; empty: it does not talk with the client."""
    server = uvicorn.Server(uvicorn_config(hello, 5, 1, settings))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        answer = b""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            host, port = listener.getsockname()
            reader, writer = await asyncio.open_connection(host, port, ssl=client, server_hostname="localhost")
            writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
        server.should_exit = True
        await task
    return answer


def test_tls_and_client_certificates(tls: Path):
    cert, key = str(tls / "cert.pem"), str(tls / "key.pem")
    client = ssl.create_default_context(cafile=cert)
    plain = tls_settings(Config(ssl_certfile=cert, ssl_keyfile=key))
    assert asyncio.run(ask(plain, client)).endswith(b"https")
    locked = Config(ssl_certfile=cert, ssl_keyfile=str(tls / "locked.pem"), ssl_keyfile_password="word")
    assert asyncio.run(ask(tls_settings(locked), client)).endswith(b"https")
    mutual = tls_settings(Config(ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=cert))
    assert asyncio.run(ask(mutual, client)) == b""
    client.load_cert_chain(cert, key)
    assert asyncio.run(ask(mutual, client)).endswith(b"https")


@pytest.mark.parametrize(
    "files",
    [
        {"ssl_certfile": "nope.pem"},
        {"ssl_certfile": "cert.pem"},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "locked.pem"},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "locked.pem", "ssl_keyfile_password": "wrong"},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem", "ssl_ca_certs": "key.pem"},
    ],
)
def test_files_that_do_not_work_are_known_before_the_model_is_loaded(tls: Path, files: dict[str, str]):
    paths = {name: value if name.endswith("password") else str(tls / value) for name, value in files.items()}
    with pytest.raises(ConfigError, match="--ssl-certfile, --ssl-keyfile or --ssl-ca-certs") as caught:
        tls_settings(Config(**paths))
    assert "wrong" not in str(caught.value)


def test_the_collector_leaves_what_is_there_alone():
    kept = [[] for _ in range(10_000)]
    freeze_objects()
    assert len(gc.get_objects()) < len(kept)
    assert gc.get_freeze_count() > len(kept)


def test_no_tls_without_a_certificate():
    assert tls_settings(Config()) == {}
    with pytest.raises(ConfigError, match="only together with --ssl-certfile"):
        tls_settings(Config(ssl_ca_certs="ca.pem"))
