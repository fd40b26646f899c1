"""Request ids: the client's or a new one, in the answer's head and in the lines of a JSON log."""

import json
import logging

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer

from multilora import logs


@pytest.fixture
def server():
    return LocalServer(FakeEngineClient(), None)


def test_the_clients_id_comes_back(server):
    assert server.get("/health", **{"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.get("/nowhere", **{"x-request-id": "abc-2"}).headers["x-request-id"] == "abc-2"


@pytest.mark.parametrize("given", ["x" * 129, "a\tb", "é", ""])
def test_what_is_no_plain_id_is_replaced(server, given):
    found = [server.get("/health", **{"x-request-id": given}).headers["x-request-id"] for _ in range(2)]
    assert len(set(found) - {given}) == 2 and all(len(one) == 32 for one in found)


def test_the_lines_of_a_request_have_its_id(server, caplog):
    line = logs.JsonLine("front")
    written = []

    class Keep(logging.Handler):
        def emit(self, record):
            written.append(json.loads(line.format(record)))

    handler = Keep()
    logging.getLogger("multilora").addHandler(handler)
    try:
        with caplog.at_level("INFO", "multilora"):
            server.post("/flush_cache", **{"x-request-id": "abc"})
    finally:
        logging.getLogger("multilora").removeHandler(handler)
    assert [(one["message"], one["request_id"]) for one in written] == [("prefix cache flushed", "abc")]
    assert logs.REQUEST_ID.get() is None
