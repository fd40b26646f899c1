"""Adapters that came as tensors, from a URL or through the resolver, kept as files, so that an evicted one can be
loaded again like every other.

It owns one directory with a folder for each version, as PEFT would have saved it, and the downloads, some of which go
there. A folder is deleted by `remove`. The directory is a private one, made when it is first needed and deleted by
`close` or when the process ends (after a `kill -9`, by the next spool), or a given one, which stays. It knows neither
names nor requests, and does not look into the weights: the loader checks them as it checks any others. Called by
`server/`, `llm/` and `front/`.
"""

import dataclasses
import enum
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.adapters.sources.download import Downloads
from multilora.adapters.sources.files import CONFIG_NAME, WEIGHTS_NAME
from multilora.config import Config
from multilora.errors import AdapterQuotaExceeded, BadRequest, StorageFailed
from multilora.private_directory import PrivateDirectory, remove_orphans

TENSOR_ROOT = "__tensor__"
"""What clients see as the path of such an adapter."""


@dataclass(frozen=True)
class SpoolShare:
    """The part of the spool that one owner's adapters may take. owner: "": whoever has no part of its own."""

    owner: str
    max_bytes: int | None


WHOLE = SpoolShare("", None)
"""No bound."""


class WritePoint(enum.Enum):
    """Moments between two writes of what outlasts the process: what it has written when it ends there."""

    FOLDER = "a folder for an adapter's files"
    FILES = "files, perhaps not on the disk yet"
    SYNCED = "files"
    RECORD = "a record, in a transaction that is not committed"
    RECORDED = "a record"
    REMOVED = "a record, and its files are deleted"


class Spool:
    """The kept adapters of one server or LLM; thread-safe. kept: the directory, which outlasts the process; None: a
    private one, where TMPDIR says. reached: is called at each `WritePoint` of one that is kept."""

    def __init__(self, kept: Path | None = None, reached: Callable[[WritePoint], None] = lambda _point: None):
        remove_orphans()
        self.downloads = Downloads()
        self._kept = kept
        self._reached = reached
        self._made: PrivateDirectory | None = None
        self._lock = threading.Lock()
        self._taken: dict[int, tuple[str, int]] = {}  # version → owner and bytes, of those with a bound

    @property
    def root(self) -> Path:
        """The directory. A private one is made at the first call, and deleted when the process ends at the latest."""
        if self._kept is not None:
            return self._kept
        with self._lock:
            if self._made is None:
                self._made = PrivateDirectory("tensors")
            return self._made.path

    def admit(self, config: Config) -> Config:
        """`config` for the engine: if --lora-root says where adapters may lie, they may also lie here."""
        if not config.lora_root:
            return config
        return dataclasses.replace(config, lora_root=(*config.lora_root, str(self.root)))

    def add(
        self, version: int, config: dict[str, Any], write: Callable[[Path], None], share: SpoolShare = WHOLE
    ) -> Path:
        """The folder of a new adapter: `config` as its adapter_config.json, its weights as `write(path)` writes them.

        Raises BadRequest for a config that is no JSON, AdapterQuotaExceeded if it does not fit into the owner's
        share, StorageFailed if the disk refuses, and what `write` raises; then nothing is left behind.
        """
        text = _json(config)
        self._check_share(share, 1)
        folder = self.root / str(version)
        try:
            folder.mkdir(mode=0o700)
            self._reached(WritePoint.FOLDER)
            (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
            write(folder / WEIGHTS_NAME)
            self._take(version, folder, share)
            self._sync(folder)
        except OSError as e:
            self.remove(version)
            raise StorageFailed(f"the tensors could not be kept: {e.strerror}") from e
        except BaseException:
            self.remove(version)
            raise
        return folder

    def receive(self, fill: Callable[[Path], bool]) -> Path | None:
        """A new folder that `fill` has filled; None, and no folder, if that says that there is nothing.

        Raises StorageFailed if the disk refuses, and what `fill` raises; then nothing is left behind.
        """
        try:
            folder = Path(tempfile.mkdtemp(prefix="incoming-", dir=self.root))
        except OSError as e:
            raise StorageFailed(f"the adapter could not be kept: {e.strerror}") from e
        found = False
        try:
            if fill(folder):
                self._sync(folder)
                found = True
        except OSError as e:
            raise StorageFailed(f"the adapter could not be kept: {e.strerror}") from e
        finally:
            if not found:
                self.discard(folder)
        return folder if found else None

    def keep(self, folder: Path, version: int, share: SpoolShare = WHOLE) -> Path:
        """The folder that `receive` has made is the version's from now on. Raises AdapterQuotaExceeded if it does not
        fit into the owner's share, and deletes it, StorageFailed."""
        try:
            self._take(version, folder, share)
        except BaseException:
            self.discard(folder)
            raise
        try:
            return folder.rename(self.root / str(version))
        except OSError as e:
            raise StorageFailed(f"the adapter could not be kept: {e.strerror}") from e

    def discard(self, folder: Path) -> None:
        """Delete a folder that `receive` has made. Nothing happens if it is gone."""
        shutil.rmtree(folder, ignore_errors=True)

    def remove(self, version: int) -> str | None:
        """Delete a version's folder. Returns where that was; None if there is no directory at all."""
        with self._lock:
            self._taken.pop(version, None)
        if self._made is None and self._kept is None:
            return None
        folder = self.root / str(version)
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            self._reached(WritePoint.REMOVED)
        return str(folder)

    def sweep(self, used: Collection[str]) -> None:
        """Delete every folder but those."""
        if self._kept is not None:
            for folder in self._kept.iterdir():
                if str(folder) not in used:
                    shutil.rmtree(folder, ignore_errors=True)

    def _sync(self, folder: Path) -> None:
        """Have the files of a folder on the disk, if they are to outlast the process."""
        if self._kept is None:
            return
        self._reached(WritePoint.FILES)
        for path in (*folder.iterdir(), folder, self._kept):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        self._reached(WritePoint.SYNCED)

    def adopt(self, version: int, owner: str) -> None:
        """Count the folder that a version has from before in the owner's share, however much that is."""
        folder = self._kept and self._kept / str(version)
        if folder and folder.exists():
            with self._lock:
                self._taken[version] = (owner, _size(folder))

    def taken(self, owner: str) -> int:
        """Bytes of the owner's adapters."""
        with self._lock:
            return self._taken_by(owner)

    def _take(self, version: int, folder: Path, share: SpoolShare) -> None:
        if share.max_bytes is None:
            return
        self._check_share(share, _size(folder), version)

    def _check_share(self, share: SpoolShare, nbytes: int, version: int | None = None) -> None:
        """Raise AdapterQuotaExceeded unless so much more fits; version: it is taken, by this one."""
        if share.max_bytes is None:
            return
        with self._lock:
            taken = self._taken_by(share.owner)
            if taken + nbytes > share.max_bytes:
                raise AdapterQuotaExceeded(
                    f"adapters that are kept on disk may take {share.max_bytes} bytes: {taken} are taken"
                )
            if version is not None:
                self._taken[version] = (share.owner, nbytes)

    def _taken_by(self, owner: str) -> int:
        return sum(nbytes for other, nbytes in self._taken.values() if other == owner)

    def close(self) -> None:
        """End the downloads and delete the directory."""
        self.downloads.close()
        if self._made is not None:
            self._made.close()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _json(config: dict[str, Any]) -> str:
    try:
        return json.dumps(config, default=_plain)
    except (TypeError, ValueError, RecursionError) as e:
        raise BadRequest(f"the adapter's config cannot be written as JSON: {e}", param="config") from None


def _plain(value: Any) -> Any:
    """PEFT's own `LoraConfig.to_dict()` holds sets."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is no JSON type")
