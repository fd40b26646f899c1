"""The spool: what it writes, its permissions, and that everything is deleted."""

import gc
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from multilora.adapters.sources.spool import Spool
from multilora.config import Config
from multilora.errors import AdapterError, BadRequest

CONFIG = {"peft_type": "LORA", "r": 4}


def weights(path: Path) -> None:
    path.write_bytes(b"weights")


def test_a_folder_as_peft_saves_it_that_only_we_can_read():
    spool = Spool()
    folder = spool.add(7, CONFIG | {"target_modules": {"v_proj", "q_proj"}}, weights)
    assert folder.parent == spool.root
    assert json.loads((folder / "adapter_config.json").read_text()) == CONFIG | {
        "target_modules": ["q_proj", "v_proj"]
    }
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (spool.root, folder)] == [0o700, 0o700]
    spool.remove(7)
    spool.remove(8)
    assert list(spool.root.iterdir()) == []
    spool.close()
    assert not folder.parent.exists()


def test_without_tensors_there_is_no_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool()
    spool.remove(1)
    assert spool.admit(Config()) == Config()
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_roots_are_widened_by_the_spool_and_by_nothing_else(tmp_path):
    spool = Spool()
    admitted = spool.admit(Config(enable_lora=True, lora_root=(str(tmp_path),)))
    assert admitted == Config(enable_lora=True, lora_root=(str(tmp_path), str(spool.root)))


def fail(error: Exception):
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    ("config", "write", "error", "said"),
    [
        (CONFIG, fail(BadRequest("no base64")), BadRequest, "no base64"),
        (CONFIG, fail(OSError(28, "No space left on device")), AdapterError, "No space left"),
        ({"r": object()}, weights, BadRequest, "object is no JSON type"),
        ({"r": {1, "a"}}, weights, BadRequest, "config cannot be written"),
    ],
)
def test_a_failure_leaves_nothing(config, write, error, said):
    spool = Spool()
    with pytest.raises(error, match=said):
        spool.add(1, config, write)
    assert list(spool.root.iterdir()) == []
    assert spool.add(1, CONFIG, weights).exists()


def test_the_directory_is_deleted_with_the_last_reference():
    spool = Spool()
    root = spool.add(1, CONFIG, weights).parent
    del spool
    gc.collect()
    assert not root.exists()


def test_the_directory_goes_with_the_process(tmp_path):
    code = "from multilora.adapters.sources.spool import Spool; s = Spool(); s.add(1, {}, lambda p: p.touch())"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


OWNER = """
import sys
from multilora.adapters.sources.spool import Spool
spool = Spool()
print(spool.add(1, {}, lambda path: path.touch()).parent, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_with_the_next_one_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool()
    mine = spool.add(1, CONFIG, weights).parent
    command, environment = [sys.executable, "-c", OWNER], os.environ | {"TMPDIR": str(tmp_path)}
    owners = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    lives, killed = (Path(owner.stdout.readline().decode().strip()) for owner in owners)
    others = [tmp_path / "multilora-tensors-old", tmp_path / "multilora-engine", tmp_path / "elsewhere"]
    for other in others:
        (other / "1").mkdir(parents=True)
    link = tmp_path / "multilora-tensors-1-link"
    link.symlink_to(tmp_path / "elsewhere")
    file = tmp_path / "multilora-tensors-1-file"
    file.touch()
    owners[1].kill()
    owners[1].wait()
    assert {mine, lives, killed} <= set(tmp_path.iterdir())
    Spool()
    assert set(tmp_path.iterdir()) == {mine, lives, *others, link, file}
    assert (lives / "1").exists() and (mine / "1").exists() and (tmp_path / "elsewhere" / "1").exists()
    owners[0].communicate()
    owners[1].communicate()
    assert not lives.exists()
