"""The process: its port, its signals, its exit code. The engine is a fake; the port and the signals are real.

Covers `text.py` too.
"""

import asyncio
import base64
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import threading
import time

import pytest
from fakes.models import FakeEngineClient
from keys import key_of, write_keys

from multilora import demo
from multilora.config import Config
from multilora.engine.process import supervisor as engine_supervisor
from multilora.errors import AdapterNotFound, ConfigError, ModelUnsupported
from multilora.server import one_process, text
from multilora.server import serve as module

SECONDS = 120


class Process:
    """Runs `serve` here, in the main thread, while `visitor` talks to it from another."""

    def __init__(self, monkeypatch, **options):
        self.client = None
        self.shut_down = []
        self.start = self._start
        self.config = Config.make(skip_tokenizer_init=True, port=0, **options)
        self.port = None
        self.stopping = False
        self.problems = []
        process = self

        class Engine:
            @classmethod
            async def start(cls, config):
                return await process.start(config)

        monkeypatch.setattr(engine_supervisor, "EngineSupervisor", Engine)

        class Handler(logging.Handler):
            def emit(self, record):
                if record.msg.startswith("ready"):
                    process.port = record.args[1]
                process.stopping |= record.getMessage() == "SIGTERM received"

        self._handler = Handler()

    async def _start(self, config):
        self.client = FakeEngineClient()
        self.engine_config = config
        self.loop = asyncio.get_running_loop()
        original = self.client.shutdown

        async def shutdown(timeout):
            self.shut_down.append(True)
            await original()

        self.client.shutdown = shutdown
        return self.client

    def run(self, visitor=None):
        logger = logging.getLogger("multilora.server.serve")
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        thread = threading.Thread(target=self._visit, args=[visitor]) if visitor else None
        try:
            if thread:
                thread.start()
            return module.serve(self.config)
        finally:
            if thread:
                thread.join(SECONDS)
            logger.removeHandler(self._handler)
            logger.setLevel(logging.NOTSET)
            assert self.problems == []

    def _visit(self, visitor):
        try:
            visitor(self)
        except BaseException as e:  # noqa: BLE001 (the main thread asserts that there was none)
            self.problems.append(e)
            os.kill(os.getpid(), signal.SIGTERM)

    def wait_for(self, condition):
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.01)

    @contextlib.contextmanager
    def request(self, method, path, body=None):
        self.wait_for(lambda: self.port)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        self.wait_for(lambda: self._connects(connection))
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        try:
            yield connection
        finally:
            connection.close()

    @staticmethod
    def _connects(connection):
        try:
            connection.connect()
        except ConnectionRefusedError:
            return False
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal(monkeypatch, number):
    process = Process(monkeypatch, lora_paths=["a=/p/a", "b=/p/b"])

    def visitor(p):
        with p.request("GET", "/v1/models") as connection:
            names = [m["id"] for m in json.load(connection.getresponse())["data"]]
            assert names == ["multilora-demo", "a", "b"]
        os.kill(os.getpid(), number)

    assert process.run(visitor) == 0
    assert process.shut_down == [True]


def test_adapters_that_came_as_tensors_leave_no_files(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = Process(monkeypatch, enable_lora=True, lora_root=["/elsewhere"])
    header = b"{}      "
    weights = base64.b64encode(len(header).to_bytes(8, "little") + header).decode()
    body = {"lora_name": "a", "config_dict": {}, "serialized_tensors": weights}

    def visitor(p):
        with p.request("POST", "/load_lora_adapter_from_tensors", body) as connection:
            assert connection.getresponse().status == 200
        [folder] = tmp_path.iterdir()
        assert p.client.loaded == {1: f"{folder}/1"}
        assert p.engine_config.lora_root == ("/elsewhere", str(folder))
        os.kill(os.getpid(), signal.SIGTERM)

    assert process.run(visitor) == 0
    assert list(tmp_path.iterdir()) == []


def test_running_requests_finish_after_the_signal_and_new_ones_are_refused(monkeypatch):
    process = Process(monkeypatch)

    def visitor(p):
        p.wait_for(lambda: p.client)
        p.loop.call_soon_threadsafe(p.client.gate.clear)
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 4}}
        with p.request("POST", "/generate", body) as connection:
            p.wait_for(lambda: p.client.submitted)
            os.kill(os.getpid(), signal.SIGTERM)
            probe = http.client.HTTPConnection("127.0.0.1", p.port, timeout=SECONDS)
            p.wait_for(lambda: not p._connects(probe) or probe.close())
            assert p.shut_down == []
            p.loop.call_soon_threadsafe(p.client.gate.set)
            answer = json.load(connection.getresponse())
            assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 4}

    assert process.run(visitor) == 0
    assert process.shut_down == [True]


class FewTokens:
    """In place of the fake engine's gate: three tokens pass, and then none."""

    left = 3

    async def wait(self):
        self.left -= 1
        if self.left < 0:
            await asyncio.Event().wait()


@pytest.mark.parametrize("twice", [False, True])
def test_requests_that_do_not_finish_in_time_end_with_an_error_each(monkeypatch, twice):
    """After --drain-seconds, or at once when a second signal comes; whatever the engine does."""
    process = Process(monkeypatch, drain_seconds=600 if twice else 1)

    def visitor(p):
        p.wait_for(lambda: p.client)
        p.client.gate = FewTokens()
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
        with p.request("POST", "/generate", body | {"stream": True}) as stream:
            answer = stream.getresponse()
            assert answer.readline().startswith(b"data: {")
            with p.request("POST", "/generate", body) as whole:
                p.wait_for(lambda: len(p.client.submitted) == 2)
                began = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)
                if twice:
                    p.wait_for(lambda: p.stopping)
                    os.kill(os.getpid(), signal.SIGTERM)
                refused = whole.getresponse()
                assert (refused.status, refused.headers["retry-after"]) == (503, "1")
                assert json.load(refused)["error"]["code"] == "ServerStopping"
                *_, error, done = [line for line in answer.read().split(b"\n") if line]
                assert b'"code":"ServerStopping"' in error and done == b"data: [DONE]"
                assert time.monotonic() - began < 10

    assert process.run(visitor) == 0
    assert process.shut_down == [True]


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("--dtype is wrong"), 2), (ModelUnsupported("GPT-5 is not served"), 1)]
)
def test_an_engine_that_cannot_start_is_one_line_and_an_exit_code(monkeypatch, caplog, error, code):
    process = Process(monkeypatch)

    async def start(config):
        raise error

    process.start = start
    assert process.run() == code
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert errors[0].startswith("cannot start: ")
    assert error.message in errors[0]


def test_a_bad_lora_path_ends_the_engine_too(monkeypatch, caplog):
    process = Process(monkeypatch, lora_paths=["a=/p/a", "b=/gone"])

    async def start(config):
        client = await process._start(config)
        client.load_errors = {"/gone": AdapterNotFound("no such directory: /gone")}
        return client

    process.start = start
    assert process.run() == 1
    assert process.shut_down == [True]
    assert "AdapterNotFound: no such directory: /gone" in caplog.text


def test_a_dead_engine_is_an_exit_code_in_the_end(monkeypatch):
    process = Process(monkeypatch)

    def visitor(p):
        p.wait_for(lambda: p.client)
        p.loop.call_soon_threadsafe(p.client.die)
        with p.request("GET", "/health") as connection:
            assert connection.getresponse().status == 503
        os.kill(os.getpid(), signal.SIGTERM)

    assert process.run(visitor) == 1


def test_a_taken_port_is_known_before_the_engine_starts(monkeypatch, caplog):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        process = Process(monkeypatch)
        process.config = Config.make(port=other.getsockname()[1])
        assert process.run() == 2
    assert process.client is None
    assert "in use" in caplog.text


def test_the_port_is_taken_while_the_engine_starts():
    """Of two servers that start together one gives up at once."""
    with module.bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"--port {port}: Address already in use"),
            module.bind("127.0.0.1", port),
        ):
            pass


def test_a_signal_while_the_engine_starts(monkeypatch):
    process = Process(monkeypatch)
    began = threading.Event()

    async def start(config):
        began.set()
        await asyncio.Event().wait()

    process.start = start

    def visitor(p):
        began.wait(SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    assert process.run(visitor) == 0


def test_sighup_reads_the_keys_again(monkeypatch, tmp_path):
    path = tmp_path / "keys.toml"
    process = Process(monkeypatch, auth_file=write_keys(path, "[keys.old]\nadmin = true"))

    def status(name):
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=SECONDS)
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key_of(name)}"})
        try:
            return connection.getresponse().status
        finally:
            connection.close()

    def visitor(p):
        with p.request("GET", "/health"):
            pass
        assert (status("old"), status("new")) == (200, 401)
        write_keys(path, "[keys.new]\nadmin = true")
        os.kill(os.getpid(), signal.SIGHUP)
        p.wait_for(lambda: status("new") == 200)
        assert status("old") == 401
        os.kill(os.getpid(), signal.SIGTERM)

    assert process.run(visitor) == 0


def test_a_wrong_file_of_keys_or_of_tls_keeps_the_server_from_starting(monkeypatch, tmp_path, caplog):
    (tmp_path / "keys.toml").write_text("[keys")
    for options in ({"auth_file": str(tmp_path / "keys.toml")}, {"ssl_certfile": str(tmp_path / "nope.pem")}):
        process = Process(monkeypatch, **options)
        assert process.run() == 2
        assert process.client is None, "no model was loaded"
    assert "--auth-file" in caplog.text
    assert "--ssl-certfile" in caplog.text


def test_keys_are_not_logged(monkeypatch, caplog):
    process = Process(monkeypatch, api_key="topsecret", metrics_key="topsecret2")

    async def start(config):
        raise ConfigError("x")

    process.start = start
    with caplog.at_level(logging.INFO):
        process.run()
    assert "api_key='***'" in caplog.text
    assert "topsecret" not in caplog.text


def test_sampling_defaults_of_a_model(tmp_path):
    assert text.sampling_defaults(str(tmp_path), None) == {}
    config = {"temperature": 0.6, "top_k": 0, "top_p": None, "eos_token_id": 2, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert text.sampling_defaults(str(tmp_path), None) == {"temperature": 0.6, "top_k": -1}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="generation_config"):
        text.sampling_defaults(str(tmp_path), None)
    with pytest.raises(ConfigError, match="neither a directory nor"):
        text.sampling_defaults("/no/such/model", None)


def test_without_a_model_path_the_demos_tokenizer_is_used(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(text.Tokenizer, "load", lambda path, **options: asked.append(path))
    text.load_text(Config())
    text.load_text(Config(model_path=str(tmp_path), tokenizer_path="/t"))
    assert asked == [str(demo.base_model_path()), "/t"]


def test_tokens_are_not_held_back_by_nagle(monkeypatch):
    """The accepted socket, since asyncio looks at its protocol before it sets TCP_NODELAY."""
    servers = []

    class Known(one_process.QuietServer):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(one_process, "QuietServer", Known)
    process = Process(monkeypatch)

    def visitor(p):
        with p.request("GET", "/health") as connection:
            assert connection.getresponse().read() == b""
            [accepted] = servers[0].server_state.connections
            of_transport = accepted.transport.get_extra_info("socket")
            assert of_transport.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        os.kill(os.getpid(), signal.SIGTERM)

    assert process.run(visitor) == 0
