"""Adapters in local directories, and `--lora-root`, which says where those may be.

It owns the rule: with roots set, the real path of the directory, and of every file in it that would be read, lies
inside one of them, whatever `..` and symbolic links there are. Called by `sources/__init__.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from multilora.adapters.sources.files import CONFIG_NAME, INDEX_NAME, show
from multilora.errors import AdapterForbidden, AdapterInvalid, AdapterNotFound


def is_encodable(path: str) -> bool:
    """Whether the system could have a file of this name at all."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


class DirectorySource:
    """Local directories, only below `roots` if there are any. extra: names of files beside an adapter's own."""

    def __init__(self, roots: Sequence[str] = (), extra: Sequence[str] = ()):
        self._roots = tuple(Path(os.path.realpath(Path(root).expanduser())) for root in roots)
        self._names = (CONFIG_NAME, INDEX_NAME, *extra)

    def fetch(self, path: str) -> Path:
        """The real path of directory `path`.

        Raises AdapterForbidden for a path outside the roots, whether or not it exists, else AdapterNotFound.
        """
        if not is_encodable(path):
            raise AdapterInvalid(f"adapter path {show(path)}: not a path")
        real = Path(os.path.realpath(os.path.expanduser(path)))
        self._check_inside(real, path)
        if not os.path.isdir(real):  # unlike Path.is_dir, false for a path that cannot be examined
            what = "is not a directory" if os.path.exists(real) else "does not exist"
            raise AdapterNotFound(f"adapter directory {show(path)} {what}")
        for file in self._files(real, path):
            self._check_inside(Path(os.path.realpath(file)), path, file.name)
        return real

    def _files(self, directory: Path, path: str) -> list[Path]:
        """Everything in the directory that `peft/checkpoint.py` or the caller might open."""
        try:
            names = sorted(os.listdir(directory))
        except OSError as e:
            raise AdapterInvalid(f"adapter directory {show(path)}: cannot be read: {e.strerror}") from None
        return [directory / n for n in names if n in self._names or n.endswith(".safetensors")]

    def _check_inside(self, real: Path, path: str, file: str | None = None) -> None:
        if self._roots and not any(real.is_relative_to(root) for root in self._roots):
            what = f"{show(file)} in adapter path {show(path)}" if file else f"adapter path {show(path)}"
            raise AdapterForbidden(f"{what} is outside every --lora-root")
