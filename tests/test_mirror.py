"""Every module of the package has its tests: `tests/…/test_<module>.py`, or a file of its sub-package's tests whose
docstring says so, as "Covers `folder/module.py`", the path being that inside the sub-package.

The base files (`params.py`, `errors.py`, …) are used by every test and need no file of their own.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "multilora"
ELSEWHERE = {
    "layers/attention.py": "tests/models/test_families.py",
    "server/pauses.py": "tests/front/test_door_pauses.py",
}
"""Modules that the tests of another sub-package cover."""


def modules() -> list[Path]:
    found = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    return [path for path in found if len(path.parts) > 1 and not path.name.startswith("__")]


def covered(unit: str) -> set[str]:
    """What the files below tests/<unit> say that they cover, and what their names say."""
    found = set()
    for path in (TESTS / unit).rglob("test_*.py"):
        found.add((path.relative_to(TESTS / unit).parent / path.name.removeprefix("test_")).as_posix())
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        found |= set(docstring.partition("Covers ")[2].replace("\n", " ").split("`")[1::2])
    return found


@pytest.mark.parametrize("unit", sorted({path.parts[0] for path in modules()}))
def test_every_module_has_its_tests(unit):
    known = covered(unit)
    missing = [path.as_posix() for path in modules() if path.parts[0] == unit]
    missing = [path for path in missing if path.partition("/")[2] not in known and path not in ELSEWHERE]
    assert missing == []


def test_what_is_said_to_be_covered_exists():
    names = {path.as_posix() for path in modules()}
    for unit in {path.parts[0] for path in modules()}:
        for path in (TESTS / unit).rglob("test_*.py"):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            said = docstring.partition("Covers ")[2].replace("\n", " ").split("`")[1::2]
            assert {f"{unit}/{name}" for name in said} <= names, path
    assert all((TESTS.parent / path).exists() for path in ELSEWHERE.values())
