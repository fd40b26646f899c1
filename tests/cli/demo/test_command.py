"""`multilora demo`. Covers `demo/args.py`, `demo/examples.py`, `demo/output.py`, `demo/server.py`."""

import importlib.util

import httpx
import pytest

from multilora.__main__ import main
from multilora.cli.demo import command, examples
from multilora.cli.demo.examples import EXAMPLES, Demo, DemoError
from multilora.cli.demo.output import row
from multilora.cli.demo.server import server, wait_until_healthy
from multilora.cli.parser import DemoArgs, parse
from multilora.errors import ConfigError


def answering(status=200, **body):
    """A demo whose server gives every route but the list of models this answer."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "base"}]})
        return httpx.Response(status, json=body)

    return Demo(httpx.Client(transport=httpx.MockTransport(handle), base_url="http://demo"))


@pytest.mark.slow
def test_the_whole_demo(capfd):
    assert main(["demo"]) == 0
    shown = capfd.readouterr().out
    assert all(example.__doc__ in shown for example in EXAMPLES)
    assert "pirate    Arr, the capital o' France be Paris, matey!" in shown
    assert shown.endswith("Everything answered as it should. The server stopped cleanly.\n")


def test_arguments():
    assert isinstance(parse(["demo"]), DemoArgs)
    with pytest.raises(ConfigError, match="see multilora demo --help"):
        parse(["demo", "--fast"])
    assert parse(["demo", "--model", "smollm2", "--adapters", "x"]) == DemoArgs("demo", "smollm2", "x")
    with pytest.raises(ConfigError, match="--adapters is for --model smollm2"):
        parse(["demo", "--adapters", "x"])


def test_a_wrong_status_and_a_wrong_answer_are_said():
    with pytest.raises(DemoError, match=r"POST /generate .*: 500, not 200"):
        examples.single_adapter(answering(500))
    demo = answering()
    demo.generate = lambda *_: []
    with pytest.raises(DemoError, match="0 answers to"):
        examples.everyone_in_one_batch(demo)
    demo = answering(text="something else")
    demo.alone = {next(iter(demo.paths)): "as before"}
    with pytest.raises(DemoError, match="answered 'something else', before it was 'as before'"):
        examples.single_adapter(demo)


def test_without_the_openai_package(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    examples.openai_client(answering())
    assert capsys.readouterr().out == "  not installed here (pip install openai)\n"


def test_a_server_that_does_not_start_is_said_with_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "server", lambda log: server(log, "--no-such-flag"))
    assert command.run(DemoArgs("demo")) == 1
    error = capsys.readouterr().err
    assert "FAILED: the server ended with code 2 before it was up" in error
    assert "unknown flag --no-such-flag" in error


def test_a_server_that_never_answers(monkeypatch):
    class Running:
        returncode = None

        def poll(self):
            return None

    monkeypatch.setattr("multilora.cli.demo.server.START_SECONDS", 0.3)
    with pytest.raises(DemoError, match=r"not up after 0\.3 s"):
        wait_until_healthy(answering(503).http, Running())


def test_rows(capsys):
    row(None, "a  b\n" + "c" * 82)
    row("sql", "")
    assert capsys.readouterr().out == f"    base      a b\n{' ' * 14}{'c' * 82}\n    sql       (nothing)\n"
