"""`multilora completion`: a real bash completes commands and flags with what it prints."""

import shutil
import subprocess
from pathlib import Path

import pytest

from multilora.__main__ import main


def script(shell: str, capsys: pytest.CaptureFixture) -> str:
    assert main(["completion", shell]) == 0
    found: str = capsys.readouterr().out
    return found


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["multilora", "do"], ["doctor"]),
        (["multilora", "serve", "--lora-back"], ["--lora-backend"]),
        (["multilora", "adapters", "ver"], ["verify"]),
    ],
)
def test_bash_completes(typed: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "completion"
    path.write_text(script("bash", capsys))
    words = " ".join(f"'{word}'" for word in typed)
    ask = (
        f"source {path}; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; "
        f"_shtab_multilora multilora '{typed[-1]}' '{typed[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert [line.strip() for line in done.stdout.splitlines() if line.strip()] == expected


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_the_other_shells_know_all_commands(shell: str, capsys: pytest.CaptureFixture) -> None:
    found = script(shell, capsys)
    for command in ("serve", "adapters", "doctor", "plan", "completion"):
        assert command in found
