"""The records of --state-dir: one SQLite database, and beside it the files of adapters that have no other place.

    DIR/lock            held by the server that uses the directory
    DIR/registry.db     names, versions, paths, pins, compositions, labels
    DIR/adapters/V/     the files of version V, which came as tensors or from a URL; `Spool` writes them

A change is one transaction, on the disk before anybody is told that it is done. So the process may end at any
moment: what is found at the next start is the state before the change or after it. Files come before their record and
go after it; those without one are swept at the start.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from multilora.adapters.sources.spool import Spool, WritePoint
from multilora.errors import ConfigError, StorageFailed
from multilora.front.records import AdapterRecord, Records, SavedState

FORMAT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT PRIMARY KEY, version INTEGER NOT NULL, path TEXT NOT NULL, local TEXT NOT NULL, pinned INTEGER NOT NULL,
    weight_version TEXT, parts TEXT NOT NULL, fingerprint TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS unloaded (name TEXT PRIMARY KEY, path TEXT NOT NULL);
"""
_COLUMNS = ("name", "version", "path", "local", "pinned", "weight_version", "parts", "fingerprint")
_SAVE = (
    f"INSERT INTO adapters ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "
    f"ON CONFLICT (name) DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in _COLUMNS[1:])} "
    "WHERE excluded.version > adapters.version"
)
_MARK = "UPDATE adapters SET fingerprint = ? WHERE name = ? AND version = ?"
_SET = "INSERT INTO facts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"


class StateDirectory(Records):
    """Thread-safe. reached: is called at each `WritePoint`, for tests that end the process there.

    Raises ConfigError if the directory cannot be used, is another server's, or of another format.
    """

    durable = True

    def __init__(self, path: str | Path, reached: Callable[[WritePoint], None] = lambda _point: None):
        super().__init__()
        self.adapters = Path(path) / "adapters"
        self._reached = reached
        self._writing = threading.Lock()
        try:
            self.adapters.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(Path(path) / "lock")
            self._db = sqlite3.connect(Path(path) / "registry.db", isolation_level=None, check_same_thread=False)
            self._prepare()
        except (OSError, sqlite3.Error) as e:
            raise ConfigError(f"--state-dir {str(path)!r} cannot be used: {e}") from None
        self.names = {name for (name,) in self._db.execute("SELECT name FROM adapters")}

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_TABLES)
        self._db.execute("INSERT OR IGNORE INTO facts VALUES ('format', ?)", [str(FORMAT)])
        found = self._fact("format")
        if found != str(FORMAT):
            raise ConfigError(f"--state-dir holds format {found}; this version reads {FORMAT}")

    def read(self) -> SavedState:
        """See `Records`."""
        with self._writing, _failing_as_storage():
            rows = self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM adapters ORDER BY version").fetchall()
            unloaded = dict(self._db.execute("SELECT name, path FROM unloaded").fetchall())
            return SavedState(
                adapters=[_record(row) for row in rows],
                next_version=int(self._fact("next_version") or 1),
                weight_version=self._fact("weight_version"),
                unloaded=unloaded,
            )

    def save(self, record: AdapterRecord) -> None:
        """See `Records`."""
        parts = json.dumps(record.parts)
        row = [record.name, record.version, record.path, record.local, record.pinned, record.weight_version, parts]
        with self._change():
            self._db.execute(_SAVE, [*row, record.fingerprint])
            self._db.execute("DELETE FROM unloaded WHERE name = ?", [record.name])
            next_version = max(record.version + 1, int(self._fact("next_version") or 1))
            self._db.execute(_SET, ["next_version", str(next_version)])
        self.names.add(record.name)

    def mark(self, name: str, version: int, fingerprint: str) -> None:
        """See `Records`."""
        with self._change():
            self._db.execute(_MARK, [fingerprint, name, version])

    def remove(self, name: str) -> None:
        """See `Records`."""
        if name not in self.names and name not in self.startup:
            return
        with self._change():
            self._db.execute("DELETE FROM adapters WHERE name = ?", [name])
            if name in self.startup:
                self._db.execute("INSERT OR REPLACE INTO unloaded VALUES (?, ?)", [name, self.startup[name]])
        self.names.discard(name)

    def label_weights(self, weight_version: str) -> None:
        """See `Records`."""
        with self._change():
            self._db.execute(_SET, ["weight_version", weight_version])

    def close(self) -> None:
        """Let another server use the directory."""
        with self._writing:
            self._db.close()
            os.close(self._lock)

    def _fact(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", [name]).fetchone()
        return None if row is None else str(row[0])

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """One transaction, on the disk at the end. Raises StorageFailed; nothing has changed then."""
        with self._writing, _failing_as_storage():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._reached(WritePoint.RECORD)
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
            self._reached(WritePoint.RECORDED)


def open_state(state_dir: str | None) -> tuple[Records, Spool]:
    """What a server keeps that was started with this --state-dir. Raises ConfigError."""
    if state_dir is None:
        return Records(), Spool()
    records = StateDirectory(state_dir)
    return records, Spool(records.adapters)


@contextlib.contextmanager
def _failing_as_storage() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as e:
        raise StorageFailed(f"the server's records cannot be written or read: {e}") from e


def _record(row: tuple[object, ...]) -> AdapterRecord:
    fields = dict(zip(_COLUMNS, row, strict=True))
    fields["pinned"] = bool(fields["pinned"])
    fields["parts"] = tuple((name, weight) for name, weight in json.loads(str(fields["parts"])))
    return AdapterRecord(**fields)  # type: ignore[arg-type]


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(f"--state-dir {str(path.parent)!r} is another server's") from None
    return fd
