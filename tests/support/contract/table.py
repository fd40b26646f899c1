"""The table of the contract: statements with ids, and how each is held."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]

Check = Callable[..., None]


@dataclass(frozen=True)
class Statement:
    """One thing that the server does. `deviates`: the peers do otherwise, and docs/api.md says so under this id.

    `node`: the test of another file that holds it, in place of `check`.
    """

    section: str
    name: str
    says: str
    check: Check | None = None
    node: str | None = None
    deviates: bool = False

    @property
    def id(self) -> str:
        return f"{self.section}/{self.name}"

    @property
    def needs_server(self) -> bool:
        return self.check is not None and "server" in inspect.signature(self.check).parameters


class Section:
    """One part of the contract. Calling it with a check adds the check's docstring as a statement."""

    def __init__(self, name: str, heading: str):
        self.name = name
        self.heading = heading
        self.statements: list[Statement] = []

    def __call__(self, check: Check) -> Check:
        return self._checked(check, deviates=False)

    def deviates(self, check: Check) -> Check:
        """The check holds what is done in place of what the peers do."""
        return self._checked(check, deviates=True)

    def elsewhere(self, name: str, says: str, node: str) -> None:
        """A statement that `node`, as pytest names tests, holds."""
        self._add(Statement(self.name, name, says, node=node))

    def _checked(self, check: Check, *, deviates: bool) -> Check:
        says = " ".join((check.__doc__ or "").split())
        self._add(Statement(self.name, check.__name__.replace("_", "-"), says, check, deviates=deviates))
        return check

    def _add(self, statement: Statement) -> None:
        assert statement.id not in {known.id for known in self.statements}, statement.id
        assert statement.says.endswith("."), f"{statement.id} is not a sentence"
        self.statements.append(statement)


def missing_part(node: str) -> str | None:
    """What of a pytest node id (`file::test` or `file::test[case]`) does not exist; None: nothing."""
    file, _, test = node.partition("::")
    path = ROOT / file
    if not path.is_file():
        return file
    name = test.partition("[")[0]
    defined = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
    return None if name.startswith("test_") and name in defined else name


def documented_deviations() -> dict[str, str]:
    """The table below `## Deviations` in docs/api.md: id → what it says."""
    text = (ROOT / "docs" / "api.md").read_text().partition("\n## Deviations\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("| `")]
    return {row[0].strip().strip("`"): " | ".join(cell.strip() for cell in row[1:]) for row in rows}
