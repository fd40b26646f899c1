"""Processes of this package do not take modules from a directory that this one does not take them from."""

import subprocess
import sys
from pathlib import Path

import multilora
from multilora.module_command import module_command

SHADOW = "import sys\nsys.stdout.write('shadowed')\nsys.exit(1)\n"


def test_a_process_has_the_working_directory_only_if_this_one_has(tmp_path, monkeypatch):
    (tmp_path / "msgspec.py").write_text(SHADOW)
    (tmp_path / "socket.py").write_text(SHADOW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(multilora.__file__).parents[1]))
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
    command = module_command("multilora", "--version")
    assert "-P" in command
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "shadowed" not in done.stdout
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    command = module_command("multilora", "--version")
    assert command == [sys.executable, "-m", "multilora", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("shadowed")


def test_in_a_directory_that_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert module_command("a", "b")[-3:] == ["-m", "a", "b"]
