"""Private directories: who may read them, and when they go. (Those of killed processes: tests of the spool and the
front.)"""

import gc
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from multilora.private_directory import PrivateDirectory, remove_orphans


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_only_we_can_read_it_until_it_is_closed() -> None:
    made = PrivateDirectory("engine")
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    (made.path / "socket").touch()
    remove_orphans()
    assert (made.path / "socket").exists(), "its owner lives"
    made.close()
    assert not made.path.exists()
    made.close()


def test_it_goes_when_nobody_has_it_any_more() -> None:
    path = PrivateDirectory("tensors").path
    gc.collect()
    assert not path.exists()


def test_what_others_have_made_stays(tmp_path: Path) -> None:
    for name in ("multilora-abcdefgh", "multilora-other-1-a", "multilora-engine", "engine-1-a"):
        (tmp_path / name).mkdir()
    (tmp_path / "multilora-engine-1-file").touch()
    before = set(tmp_path.iterdir())
    (tmp_path / "multilora-engine-1-orphan").mkdir()
    remove_orphans()
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("before", ["os.open", "fcntl.flock"])
def test_one_that_is_taken_for_an_orphan_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Another process may look for orphans before the directory is locked."""
    module, name = before.split(".")
    function = getattr(sys.modules[module], name)

    def late(*args: object) -> object:
        monkeypatch.undo()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert len(list(tmp_path.iterdir())) == 1
        remove_orphans()
        assert list(tmp_path.iterdir()) == []
        return function(*args)

    monkeypatch.setattr(before, late)
    made = PrivateDirectory("tensors")
    assert [made.path] == list(tmp_path.iterdir())


def test_a_process_that_ends_at_once_leaves_nothing_and_waits_for_no_thread(tmp_path: Path) -> None:
    code = (
        "import threading; from multilora.private_directory import PrivateDirectory, end_process;"
        "threading.Thread(target=threading.Event().wait).start();"
        "made = PrivateDirectory('engine'); print('said', end=''); end_process(3)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said", "")
    assert not list(tmp_path.iterdir())
