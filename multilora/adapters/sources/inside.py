"""Adapters below a directory in which clients may name them, copied so that no name leads out of it.

It owns two rules. A name is a relative path none of whose parts is empty or begins with a dot. And what is opened
lies below the directory: a path is resolved, checked, and then walked from the directory's descriptor without
following any link, so a part that is swapped for a link after the check is refused. The files are copied, and only
the copy is read later, so nothing can be swapped afterwards either. Called by `front/fetcher.py`.
"""

import errno
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from multilora.adapters.sources.copying import Allowance, copy_file
from multilora.adapters.sources.directory import is_encodable
from multilora.adapters.sources.files import CONFIG_NAME, INDEX_NAME, show

logger = logging.getLogger(__name__)

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NONBLOCK: opening a pipe must not block


def is_name(name: str) -> bool:
    """Whether an adapter below a directory could have this name: no `..`, no absolute path, nothing hidden."""
    return is_encodable(name) and all(part and not part.startswith(".") for part in name.split("/"))


def copy_adapter(root: str, name: str, target: Path, *, extra: Sequence[str], allowance: Allowance) -> bool:
    """Copy the files of adapter `name` below directory `root` into the directory `target`.

    extra: names of files beside an adapter's own. False: there is no such adapter, or not inside `root`; `target` may
    hold some files then. Raises AdapterError if the disk refuses, AdapterIncompatible, as `Allowance` does.
    """
    if not is_name(name):
        return False
    real_root = Path(os.path.realpath(os.path.expanduser(root)))
    wanted = {CONFIG_NAME, INDEX_NAME, *extra}
    try:
        directory = _open_inside(real_root, real_root / name)
        try:
            names = sorted(os.listdir(directory))
            if CONFIG_NAME not in names:
                return False
            for file in names:
                if file in wanted or file.endswith(".safetensors"):
                    _copy_regular(directory, real_root, real_root / name / file, target / file, allowance)
        finally:
            os.close(directory)
    except OSError as e:
        logger.info("adapter %s is not served from %s: %s", show(name), root, e.strerror or e)
        return False
    return True


def _copy_regular(directory: int, root: Path, path: Path, target: Path, allowance: Allowance) -> None:
    """Copy the file at `path`, which is an entry of the open `directory`; a link may lead elsewhere below `root`."""
    try:
        fd = os.open(path.name, _OPEN, dir_fd=directory)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        fd = _open_inside(root, path)
    with os.fdopen(fd, "rb", buffering=0) as source:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, f"{show(path.name)} is not a regular file")
        copy_file(source, target, allowance)


def _open_inside(root: Path, path: Path) -> int:
    """A descriptor of what `path` is, which lies below `root`. Raises OSError."""
    parts = _parts_below(root, Path(os.path.realpath(path)))
    fd = os.open(root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    for part in parts:
        try:
            below = os.open(part, _OPEN, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def _parts_below(root: Path, real: Path) -> tuple[str, ...]:
    if real == root or not real.is_relative_to(root):
        raise OSError(errno.EACCES, "it lies outside the directory")
    return real.relative_to(root).parts
