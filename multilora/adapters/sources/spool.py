"""Adapters that came as tensors, from a URL or through the resolver, kept as files, so that an evicted one can be
loaded again like every other.

It owns one private directory (made when it is first needed) with a folder for each version, as PEFT would have saved
it, and the downloads, some of which go there. A folder is deleted by `remove`, the directory by `close` or when the
process ends; after a `kill -9`, by the next spool. It knows neither names nor requests, and does not look into the
weights: the loader checks them as it checks any others. Called by `server/`, `llm/` and `front/`.
"""

import dataclasses
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multilora.adapters.sources.download import Downloads
from multilora.adapters.sources.files import CONFIG_NAME, WEIGHTS_NAME
from multilora.config import Config
from multilora.errors import AdapterError, BadRequest
from multilora.private_directory import PrivateDirectory, remove_orphans

TENSOR_ROOT = "__tensor__"
"""What clients see as the path of such an adapter."""


class Spool:
    """The kept adapters of one server or LLM. The directory lies where TMPDIR says; thread-safe."""

    def __init__(self) -> None:
        remove_orphans()
        self.downloads = Downloads()
        self._made: PrivateDirectory | None = None
        self._lock = threading.Lock()

    @property
    def root(self) -> Path:
        """The directory. It is made at the first call, and deleted when the process ends at the latest."""
        with self._lock:
            if self._made is None:
                self._made = PrivateDirectory("tensors")
            return self._made.path

    def admit(self, config: Config) -> Config:
        """`config` for the engine: if --lora-root says where adapters may lie, they may also lie here."""
        if not config.lora_root:
            return config
        return dataclasses.replace(config, lora_root=(*config.lora_root, str(self.root)))

    def add(self, version: int, config: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """The folder of a new adapter: `config` as its adapter_config.json, its weights as `write(path)` writes them.

        Raises BadRequest for a config that is no JSON, AdapterError if the disk refuses, and what `write` raises;
        then nothing is left behind.
        """
        text = _json(config)
        folder = self.root / str(version)
        try:
            folder.mkdir(mode=0o700)
            (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
            write(folder / WEIGHTS_NAME)
        except OSError as e:
            self.remove(version)
            raise AdapterError(f"the tensors could not be kept: {e.strerror}") from e
        except BaseException:
            self.remove(version)
            raise
        return folder

    def receive(self, fill: Callable[[Path], bool]) -> Path | None:
        """A new folder that `fill` has filled; None, and no folder, if that says that there is nothing.

        Raises AdapterError if the disk refuses, and what `fill` raises; then nothing is left behind.
        """
        try:
            folder = Path(tempfile.mkdtemp(prefix="incoming-", dir=self.root))
        except OSError as e:
            raise AdapterError(f"the adapter could not be kept: {e.strerror}") from e
        found = False
        try:
            found = fill(folder)
        finally:
            if not found:
                self.discard(folder)
        return folder if found else None

    def keep(self, folder: Path, version: int) -> Path:
        """The folder that `receive` has made is the version's from now on. Raises AdapterError."""
        try:
            return folder.rename(self.root / str(version))
        except OSError as e:
            raise AdapterError(f"the adapter could not be kept: {e.strerror}") from e

    def discard(self, folder: Path) -> None:
        """Delete a folder that `receive` has made. Nothing happens if it is gone."""
        shutil.rmtree(folder, ignore_errors=True)

    def remove(self, version: int) -> str | None:
        """Delete a version's folder. Returns where that was; None if there is no directory at all."""
        if self._made is None:
            return None
        folder = self._made.path / str(version)
        shutil.rmtree(folder, ignore_errors=True)
        return str(folder)

    def close(self) -> None:
        """End the downloads and delete the directory."""
        self.downloads.close()
        if self._made is not None:
            self._made.close()


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
