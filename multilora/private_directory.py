"""Directories in TMPDIR that only this user can read, and that are always deleted.

A directory is deleted by `close` or when its process ends. After a `kill -9` the next call of `remove_orphans`, in
any process of this user, deletes it: a living owner holds a lock on it. The engine's process calls it when its front
is gone. Called by `adapters/sources/spool.py`, `engine/process/client.py`, `engine/process/worker.py`,
`engine/ranks/lead.py` and `__main__.py`.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import NoReturn

logger = logging.getLogger(__name__)

_open: "weakref.WeakSet[PrivateDirectory]" = weakref.WeakSet()
_NAME = re.compile(r"multilora-(tensors|engine|ranks|fronts)-\d+-")  # then the owner's process id, for information


class PrivateDirectory:
    """A new directory of mode 0700. kind: a part of its name, "tensors", "engine", "ranks" or "fronts"."""

    def __init__(self, kind: str):
        self.path, lock = _make(f"multilora-{kind}-{os.getpid()}-")
        assert _NAME.match(self.path.name)
        self._discard = weakref.finalize(self, _discard, self.path, lock)
        _open.add(self)

    def close(self) -> None:
        """Delete the directory and all that is in it."""
        self._discard()


def close_all() -> None:
    """Delete this process's own, for one that ends without the interpreter's orderly end."""
    for directory in list(_open):
        directory.close()


def end_process(code: int) -> NoReturn:
    """End this process now, with its directories but without the interpreter's own end: that takes seconds where
    there is a lot to free, and waits for every thread, also one that waits for a network."""
    close_all()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(code)


def remove_orphans() -> None:
    """Delete the directories that killed processes have left in TMPDIR."""
    root = tempfile.gettempdir()
    with contextlib.suppress(OSError):  # another process has deleted it, or it is not readable
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
        os.close(lock)  # its owner lives, or the file system has no locks, so that one cannot know
        return
    logger.info("removing %s: the process that made it was killed", path)
    _discard(path, lock)


def _make(prefix: str) -> tuple[Path, int]:
    """A new directory, and the file descriptor that holds its lock. If another process deletes it as an orphan before
    it is locked, another one is made."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # the file system has no locks, so no other process gets one either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _discard(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
