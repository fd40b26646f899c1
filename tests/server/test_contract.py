"""The contract: each statement of `tests/support/contract` is a test, against a running server where it is about one.

What a drop-in server must answer was read from the sources of SGLang 0.5.23 and vLLM 0.33.0, and seen in what
unmodified clients send. Where this server does otherwise, the check says what it does, and docs/api.md why.
"""

import inspect

import pytest

pytest.register_assert_rewrite("contract")

from contract import adapters, bad_input, clients, command_line, generate, openai, operations, rollouts  # noqa: E402
from contract.table import Statement, documented_deviations, missing_part  # noqa: E402
from contract.world import LOADED, ContractServer, start  # noqa: E402

MODULES = (command_line, generate, adapters, openai, operations, clients, rollouts, bad_input)
SECTIONS = [module.line for module in MODULES]
STATEMENTS = [statement for section in SECTIONS for statement in section.statements]
CHECKED = [statement for statement in STATEMENTS if statement.check]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with start(tmp_path_factory) as running:
        yield running


@pytest.mark.parametrize("statement", CHECKED, ids=lambda s: s.id)
def test_statement(statement: Statement, request):
    wanted = inspect.signature(statement.check).parameters
    statement.check(**{name: request.getfixturevalue(name) for name in wanted})
    if statement.needs_server:
        server: ContractServer = request.getfixturevalue("server")
        left = [name for name in server.loaded_adapters() if name not in LOADED]
        for name in left:
            server.unload(name)
        assert left == [], "the check has left something behind"
        assert server.loaded_adapters() == LOADED
        assert server.get("/is_paused").json() == {"is_paused": False}


def test_tests_of_other_files_that_hold_a_statement_exist():
    found = {s.id: missing_part(s.node) for s in STATEMENTS if s.node}
    assert {name: part for name, part in found.items() if part} == {}
    assert missing_part("tests/server/test_contract.py::test_of_nothing") == "test_of_nothing"
    assert missing_part("tests/server/no_file.py::test_a") == "tests/server/no_file.py"


def test_every_deviation_is_documented_with_its_reason_and_no_other():
    documented = documented_deviations()
    assert set(documented) == {s.id for s in STATEMENTS if s.deviates}
    assert all(len(text) > 40 for text in documented.values())


def test_ids_are_of_one_statement():
    assert len({s.id for s in STATEMENTS}) == len(STATEMENTS)
    assert all(section.heading and section.statements for section in SECTIONS)
