"""What a server remembers in --state-dir, and that SIGKILL at any write loses nothing that was acknowledged.

Covers `records.py`, `restoring.py` too.
"""

import dataclasses
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from registry_process import RegistryProcess, adapter, changes, tensors

from multilora.adapters.sources.spool import WritePoint
from multilora.errors import AdapterError, AdapterNotFound, AdapterNotLoaded, ConfigError, StorageFailed
from multilora.front.records import AdapterRecord, Records
from multilora.front.state_directory import StateDirectory, open_state

PATHS = {"startup": "s"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for text in ("a1", "a2", "b1", "b2", "s"):
        adapter(root, text)
    return root


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def again(p: RegistryProcess, state: Path, **options: Any) -> RegistryProcess:
    """The server stops and another one starts."""
    p.close()
    return RegistryProcess(state, **options)


# ---------------------------------------------------------------------- SIGKILL


def acknowledged(root: Path, number: int) -> list[Any]:
    path = root / f"{number}.acks"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_at(root: Path, *numbers: int) -> None:
    here = Path(__file__).parents[1] / "support"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    subprocess.run(
        [sys.executable, "-m", "registry_process", str(root), *map(str, numbers)], env=environment, check=True
    )


def check(root: Path, number: int, states: list[Any]) -> None:
    """After a kill at that point the state is that of the last acknowledgement, or of the next change."""
    before = acknowledged(root, number)
    expected = states[max(0, len(before) - 1) : len(before) + 1]
    p = RegistryProcess(root / str(number), lora_paths={"startup": str(root / "s")})
    found = p.state()
    startup = [s.pop("startup", None) for s in ({**found}, *[{**s} for s in expected])]
    assert bool(startup[0]) in {bool(s) for s in startup[1:]}
    versions = [{k: v for k, v in s.items() if k != "startup"} for s in (found, *expected)]
    assert versions[0] in versions[1:], f"point {number}: {len(before)} changes were acknowledged"
    folders = {int(folder.name) for folder in p.spool.root.iterdir()}
    assert folders == {v[2] for k, v in found.items() if k == "t"}, "files of nobody, or a record without its files"
    used = [v[2] for s in before for k, v in s.items() if k]
    info = p.run(p.front.adapters.load("new", str(root / "a1")))
    assert info.version > max(used, default=0), "a number is used twice"
    p.close()


def all_points(root: Path) -> list[Any]:
    """The states after each change, and last how many write points there are."""
    kill_at(root, 10_000)
    return acknowledged(root, 10_000)


@pytest.mark.slow
def test_killed_at_some_writes(root: Path) -> None:
    *states, count = all_points(root)
    assert count > 30 and len(states) == 15
    numbers = range(0, count, 7)
    kill_at(root, *numbers)
    for number in numbers:
        check(root, number, states)


@pytest.mark.slow
def test_killed_at_every_write(tmp_path: Path) -> None:
    for text in ("a1", "a2", "b1", "b2", "s"):
        adapter(tmp_path, text)
    *states, count = all_points(tmp_path)
    kill_at(tmp_path, *range(count))
    for number in range(count):
        check(tmp_path, number, states)


# ---------------------------------------------------------------------- restarts


def test_everything_is_as_it_was(root: Path, state: Path) -> None:
    p = RegistryProcess(state)
    for change in changes(p, root)[:-1]:
        p.run(change)
        before = p.state()
        p = again(p, state)
        assert p.state() == before
        change.close()
        break
    for number in range(1, 7):
        p.run(changes(p, root)[number])
        before = p.state()
        p = again(p, state)
        assert p.state() == before
    assert set(p.registry.loaded()) == {"a", "t", "b", "c"}
    p.close()


def test_what_clients_did_counts_more_than_the_command_line(root: Path, state: Path) -> None:
    options = {"lora_paths": {"x": str(root / "a1"), "y": str(root / "b1"), "z": str(root / "s")}}
    p = RegistryProcess(state, **options)
    p.run(p.front.adapters.load("x", str(root / "a2"), replace=True))
    p.run(p.front.adapters.unload("y"))
    p = again(p, state, **options)
    assert p.registry.loaded() == {"z": str(root / "s"), "x": str(root / "a2")}
    p = again(p, state, lora_paths={"y": str(root / "b2")})
    assert set(p.registry.loaded()) == {"x", "y"}, "another path is another adapter; z was never a client's"
    p.run(p.front.adapters.unload("x"))
    p = again(p, state)
    assert p.registry.loaded() == {}
    p.close()


def test_files_that_are_gone_are_remembered_and_files_that_changed_are_another_version(
    root: Path, state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    p = RegistryProcess(state)
    gone, changed = adapter(tmp_path, "gone"), adapter(tmp_path, "changed")
    p.run(p.front.adapters.load("gone", gone))
    p.run(p.front.adapters.load("changed", changed, pinned=True))
    p.run(p.front.adapters.compose("c", [{"name": "gone", "weight": 1.0}, {"name": "changed", "weight": 1.0}]))
    shutil.rmtree(gone)
    Path(changed, "adapter_model.safetensors").write_text("other")
    p = again(p, state)
    assert p.state() == {"": "default", "changed": [["other", True], None, 4]}
    assert "'gone' of --state-dir is not served" in caplog.text and "composition 'c'" in caplog.text
    adapter(tmp_path, "gone")
    p = again(p, state)
    assert set(p.registry.loaded()) == {"gone", "changed", "c"}
    shutil.rmtree(gone)
    p = again(p, state)
    with pytest.raises(AdapterNotFound):
        p.run(p.front.adapters.load("gone", gone))
    p.run(p.front.adapters.unload("c"))
    p.run(p.front.adapters.unload("gone"))
    with pytest.raises(AdapterNotLoaded):
        p.run(p.front.adapters.unload("gone"))
    adapter(tmp_path, "gone")
    p = again(p, state)
    assert set(p.registry.loaded()) == {"changed"}
    p.close()


def test_marks_of_times_and_inodes_are_replaced(
    root: Path, state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As versions wrote them for which a touched file was another one."""
    p = RegistryProcess(state)
    path = adapter(tmp_path, "a")
    p.run(p.front.adapters.load("a", path, pinned=True))
    (record,) = p.records.read().adapters
    p.records.mark("a", record.version, "0" * 64)
    p.records.mark("a", record.version + 1, "another version's")
    (old,) = p.records.read().adapters
    assert old == dataclasses.replace(record, fingerprint="0" * 64)
    p = again(p, state)
    (marked,) = p.records.read().adapters
    assert marked == record, "the same version, with a mark that tells"
    assert "'a': an old mark does not tell whether its files changed" in caplog.text
    Path(path, "adapter_model.safetensors").write_text("other")
    p = again(p, state)
    (changed,) = p.records.read().adapters
    assert changed.version > record.version
    p.close()


def test_without_lora_nothing_is_forgotten(root: Path, state: Path) -> None:
    p = RegistryProcess(state)
    p.run(p.front.adapters.load("a", str(root / "a1")))
    p.close()
    records, spool = open_state(str(state))
    assert records.durable and spool.root == state / "adapters"
    assert [record.name for record in records.read().adapters] == ["a"]
    records.close()


# ---------------------------------------------------------------------- a disk that refuses


def test_a_change_that_cannot_be_written_has_not_happened(root: Path, state: Path) -> None:
    full = False

    def reached(point: WritePoint) -> None:
        if full and point is WritePoint.RECORD:
            raise sqlite3.OperationalError("database or disk is full")

    p = RegistryProcess(state, reached)
    for change in changes(p, root)[:4]:
        p.run(change)
    before = p.state()
    full = True
    manager = p.front.adapters
    for change in (
        manager.load("new", str(root / "a1")),
        manager.load("a", str(root / "a2"), replace=True),
        manager.load_tensors("t", {}, tensors("t9"), replace=True),
        manager.compose("d", [{"name": "a", "weight": 1.0}]),
        manager.unload("c"),
        manager.label_weights("step-9"),
    ):
        with pytest.raises(StorageFailed, match="disk is full"):
            p.run(change)
        assert p.state() == before
        assert set(p.engine.loaded) == {v[2] for k, v in before.items() if k not in ("", "c")}
    full = False
    assert again(p, state).state() == before


def test_a_part_stays_while_its_composition_is_written(root: Path, state: Path) -> None:
    p = RegistryProcess(state)
    p.run(p.front.adapters.load("a", str(root / "a1")))
    version = p.registry.begin_compose("c", (("a", 1.0),))
    with pytest.raises(AdapterError, match="part of composition 'c'"):
        p.run(p.front.adapters.unload("a"))
    p.registry.fail_load(version)
    p.run(p.front.adapters.unload("a"))
    p.close()


# ---------------------------------------------------------------------- the directory


def test_one_server_at_a_time(state: Path) -> None:
    first = StateDirectory(state)
    with pytest.raises(ConfigError, match="another server's"):
        StateDirectory(state)
    first.close()
    StateDirectory(state).close()


@pytest.mark.parametrize("broken", ["a file", "not a database", "another format"])
def test_a_directory_that_cannot_be_used(state: Path, broken: str) -> None:
    if broken == "a file":
        state.write_text("")
    else:
        StateDirectory(state).close()
        if broken == "another format":
            with sqlite3.connect(state / "registry.db") as db:
                db.execute("UPDATE facts SET value = '99' WHERE name = 'format'")
        else:
            for name in ("registry.db", "registry.db-wal"):
                (state / name).write_bytes(b"x" * 8192)
    with pytest.raises(ConfigError, match="--state-dir"):
        StateDirectory(state)


def test_a_later_version_is_not_replaced_by_an_earlier_one(state: Path) -> None:
    records = StateDirectory(state)
    for version in (3, 2):
        records.save(AdapterRecord(name="a", version=version, path=f"/{version}"))
    saved = records.read()
    assert [record.path for record in saved.adapters] == ["/3"] and saved.next_version == 4
    records.close()


def test_without_a_directory_nothing_is_kept() -> None:
    records, spool = open_state(None)
    records.save(AdapterRecord(name="a", version=1, path="/a"))
    records.label_weights("x")
    records.remove("a")
    assert records.read() == Records().read() and not records.durable
    records.close()
    spool.close()
