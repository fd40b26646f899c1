"""One line per message, in one format, in a process that calls setup twice."""

import json
import logging
import re

import pytest

from multilora import logs


@pytest.fixture(autouse=True)
def put_back():
    root, ours = logging.getLogger(), logging.getLogger("multilora")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:], level, own = before
    root.setLevel(level)
    ours.setLevel(own)
    logging.captureWarnings(False)


def test_format(capsys):
    logs.setup("info", role="engine")
    logging.getLogger("multilora.engine.x").info("decode: batch %d", 8)
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO    engine decode: batch 8\n", line)


def test_second_setup_replaces_the_first(capsys):
    logs.setup("info")
    logs.setup("info")
    logging.getLogger("multilora").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_message_cannot_forge_a_line(capsys):
    logs.setup("info")
    logging.getLogger("multilora").info("name: %s", "a\r\n2026 INFO fake")
    assert capsys.readouterr().err.endswith("name: a\\r\\n2026 INFO fake\n")


@pytest.mark.parametrize(("level", "shown"), [("debug", "diwW"), ("info", "iwW"), ("warning", "wW"), ("error", "")])
def test_levels(capsys, level, shown):
    logs.setup(level)
    ours, other = logging.getLogger("multilora.x"), logging.getLogger("otherlib")
    ours.debug("<d>")
    ours.info("<i>")
    ours.warning("<w>")
    other.info("<I>")
    other.warning("<W>")
    assert "".join(re.findall("<(.)>", capsys.readouterr().err)) == shown


def test_json_lines(capsys):
    logs.setup("info", role="engine", form="json")
    log = logging.getLogger("multilora.x")
    token = logs.REQUEST_ID.set("abc")
    log.info("two\nlines of %s", "é")
    logs.REQUEST_ID.reset(token)
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    said = {"level": "info", "role": "engine", "logger": "multilora.x", "message": "two\nlines of é"}
    assert first == said | {"request_id": "abc"}
    assert "request_id" not in second and second["exception"].endswith("ValueError: no")


def test_recent_lines_are_few_short_and_of_the_front_only():
    lines = logs.RecentLines()
    logger = logging.Logger("x")
    logger.addHandler(lines)
    for i in range(logs.KEPT_LINES + 3):
        logger.info("%d" + "x" * logs.KEPT_CHARACTERS, i)
    kept = lines.after(0)
    assert [line["number"] for line in kept] == list(range(4, logs.KEPT_LINES + 4))
    assert all(len(line["message"]) == logs.KEPT_CHARACTERS for line in kept)
    assert lines.after(logs.KEPT_LINES + 2) == kept[-1:]
    logger.info("%d", "no number")
    assert lines.after(logs.KEPT_LINES + 3)[0]["message"] == "%d"
    logs.setup("info", role="engine")
    assert logs.RECENT not in logging.getLogger().handlers
    logs.setup("info")
    logs.setup("info")
    assert logging.getLogger().handlers.count(logs.RECENT) == 1


def test_lines_of_other_processes_are_kept_with_the_own_ones():
    lines = logs.RecentLines()
    logger = logging.Logger("x")
    logger.addHandler(lines)
    logger.info("own")
    lines.take("front-2", [(5.0, "error", "theirs"), (6.0, "info", "y" * 3000)])
    own, theirs, long = lines.after(0)
    assert own["message"] == "own"
    assert theirs == {"number": 2, "time": 5.0, "level": "error", "message": "front-2: theirs"}
    assert len(long["message"]) == logs.KEPT_CHARACTERS and lines.after(2) == [long]


def test_every_front_process_keeps_its_lines():
    for role, kept in (("front-1", 1), ("rank 1", 0), ("front", 1)):
        logs.setup("info", role=role)
        assert logging.getLogger().handlers.count(logs.RECENT) == kept
