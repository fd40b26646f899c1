"""The list of clients, their programs, the committed results and the table in docs/clients.md say the same."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).with_name("programs")
SHARED = {"checks.py", "checks.mjs", "load.py"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`scripts/clients.py`."""
    spec = importlib.util.spec_from_file_location("clients", ROOT / "scripts" / "clients.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["clients"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clients(script):
    return script.clients()


@pytest.fixture
def results(script):
    return json.loads(script.RESULTS.read_text())


def test_every_program_belongs_to_one_client(clients):
    named = [client.program for client in clients]
    assert sorted(named) == sorted({path.name for path in PROGRAMS.iterdir() if path.is_file()} - SHARED)
    assert len({client.name for client in clients}) == len(clients)


def test_every_version_is_pinned(clients):
    for client in clients:
        pin = re.compile(r"@\d+\.\d" if client.program.endswith(".mjs") else r"==\d")
        for package in client.install + client.no_deps:
            assert pin.search(package), f"{client.name}: {package}"


def test_every_check_of_every_client_has_a_result(clients, results):
    assert sorted(results) == sorted(client.name for client in clients)
    for client in clients:
        rows = [row["check"] for row in results[client.name]]
        written = re.findall(r'\bcheck\("([^"{]+)"', (PROGRAMS / client.program).read_text())
        assert rows, client.name
        assert set(written) <= set(rows), f"{client.name}: run `make test-clients ARGS={client.name}`"
        assert len(rows) == len(set(rows))


def test_the_table_shows_every_result(script, clients, results):
    page = script.TABLE.read_text()
    assert script.table(results, clients) in page
    failures = [row for rows in results.values() for row in rows if not row["ok"]]
    assert page.count("| **fails**: ") == len(failures)
    assert page.count("| passes |") == sum(len(rows) for rows in results.values()) - len(failures)


def test_every_client_is_described(script, clients):
    described = set(re.findall(r"^- \*\*(.+?)\*\*", script.TABLE.read_text(), re.MULTILINE))
    assert described == {client.name for client in clients}


def test_a_failure_is_a_row_of_the_table(script):
    [client] = [client for client in script.clients() if client.name == "openai"]
    rows = {"openai": [{"check": "chat", "ok": False, "detail": "400 | no"}]}
    assert script.table(rows, [client]).splitlines()[-1].endswith("| chat | **fails**: 400 \\| no |")
