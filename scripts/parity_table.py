"""Runs the parity tests and writes their results into the table at the end of docs/adapters.md.

    python scripts/parity_table.py

Run it after a row was added to tests/support/peft_rows.py; a test fails until then.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "adapters.md"
TESTS = "tests/engine/test_peft_parity.py"
BEGIN, END = "<!-- parity table: written by scripts/parity_table.py -->", "<!-- end of the parity table -->"
HEAD = ["| what PEFT saved | base model | here |", "|---|---|---|"]


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of the table. results: as the tests write them."""
    lines = [f"| {feature} | {result['model']} | {outcome(result)} |" for feature, result in results.items()]
    return [*HEAD, *lines]


def outcome(result: dict[str, Any]) -> str:
    if "refused" in result:
        return f"refused: {result['refused']}"
    return f"the same, to {result['difference']:.0e}".replace("e-0", "e-")


def written(text: str) -> list[str]:
    """The table's lines in the text of docs/adapters.md."""
    return text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", "-q", TESTS, "-k", "test_parity and alone"]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PARITY_RESULTS": str(file)})
        results = json.loads(file.read_text())
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text("\n".join([before + BEGIN, *table(results), END]) + after)


if __name__ == "__main__":
    main()
