"""What replicas that are gone have left: adapters that came as tensors or from a URL, `<spool>/<replica>/<version>`.

A replica deletes its own folders; what it leaves behind when it ends stays as long as a record of the registry says
that an adapter lies there, as other replicas read it from there. Called by `ray_app.py`.
"""

import shutil
import time
from collections.abc import Collection
from pathlib import Path

OLD_SECONDS = 600.0
"""A younger folder may be one of a replica that is about to join, or to write its record."""


def sweep(spool: Path, used: Collection[str], replicas: Collection[str], now: float | None = None) -> list[Path]:
    """Delete what nobody needs. used: directories that records name; replicas: those that there are. Returns what was
    deleted."""
    now = time.time() if now is None else now
    gone: list[Path] = []
    for owner in spool.iterdir() if spool.is_dir() else ():
        if owner.name in replicas or not _old(owner, now):
            continue
        for folder in owner.iterdir():
            if str(folder) not in used and _old(folder, now):
                shutil.rmtree(folder, ignore_errors=True)
                gone.append(folder)
        if not any(owner.iterdir()):
            owner.rmdir()
            gone.append(owner)
    return gone


def _old(path: Path, now: float) -> bool:
    return now - path.stat().st_mtime > OLD_SECONDS
