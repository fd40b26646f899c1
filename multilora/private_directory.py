"""Directories in TMPDIR that only we can read, and that nothing leaves behind.

One goes with `close` or with the process; after a `kill -9` when anybody asks for `remove_orphans`: its owner holds a
lock on it as long as it lives. Called by `adapters/sources/spool.py` and `engine/process/client.py`.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)

_NAME = re.compile(r"multilora-(tensors|engine)-\d+-")  # with the owner's process id, for people who look


class PrivateDirectory:
    """kind: what its name says of it, one of those above. Mode 0700."""

    def __init__(self, kind: str):
        self.path, lock = _make(f"multilora-{kind}-{os.getpid()}-")
        assert _NAME.match(self.path.name)
        self._discard = weakref.finalize(self, _discard, self.path, lock)

    def close(self) -> None:
        """Remove it with all that is in it."""
        self._discard()


def remove_orphans() -> None:
    """Remove what processes that were killed have left where TMPDIR says."""
    root = tempfile.gettempdir()
    with contextlib.suppress(OSError):  # what others remove meanwhile, or is not ours to read, is no concern of ours
        for name in os.listdir(root):
            if _NAME.match(name):
                _remove_orphan(Path(root, name))


def _remove_orphan(path: Path) -> None:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return  # another user's, or no directory
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)  # its owner lives, or this file system knows no locks: then nobody can tell
        return
    logger.info("removing %s: the process that made it was killed", path)
    _discard(path, lock)


def _make(prefix: str) -> tuple[Path, int]:
    """A new directory, and the file descriptor that holds its lock. Whoever looks for orphans may be faster than the
    lock: then another one."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # no locks on this file system: nobody else gets one either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _discard(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
