"""README and docs: every `python -m …` and `python scripts/…` of this repository is there, and knows the flags that
are typed after it. What they do is a matter of their own tests; the examples are run in `tests/examples`."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "multilora" / "demo" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
COMMAND = re.compile(r"python3? (?:-m )?((?:bench|scripts|examples)[./][^`\n|]*)")
OF_A_COMMAND = {"scripts.train_smollm2": 1}
"""Scripts with commands of their own: how many words before the flags name one."""


def typed() -> dict[tuple[str, ...], set[str]]:
    """Module or file (and its command), and the flags that any page gives it."""
    found: dict[tuple[str, ...], set[str]] = {}
    for page in PAGES:
        for line in COMMAND.findall(page.read_text().replace("\\\n", " ")):
            words = shlex.split(line.partition(" #")[0].replace("'", " ").replace('"', " "))
            name = words[0].rstrip(".,;:)")
            command = words[1 : 1 + OF_A_COMMAND.get(name, 0)]
            flags = {re.split("[=,.;:)]", word)[0] for word in words if word.startswith("--")}
            found.setdefault((name, *command), set()).update(flags)
    return found


TYPED = typed()


def file_of(name: str) -> Path | None:
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/"))
    tried = [path, path.with_suffix(".py"), path / "__main__.py"]
    return next((one for one in tried if one.is_file()), None)


def test_every_script_is_there():
    assert len(TYPED) > 15
    assert [name for name, *_ in TYPED if file_of(name) is None] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", [key for key, flags in TYPED.items() if flags], ids=" ".join)
def test_a_script_knows_the_flags_that_are_typed(command):
    name, *words = command
    start = [name] if name.endswith(".py") else ["-m", name]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *start, *words, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    known = set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))
    assert TYPED[command] <= known, f"{' '.join(command)} does not know {TYPED[command] - known}"
