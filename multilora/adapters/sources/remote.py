"""Adapters in buckets and on web servers, `s3://`, `gs://`, `http://` and `https://`, through fsspec.

Owns the cache directory, in which each state of an adapter is a folder of its own: what is there is complete and is
never written to again. fsspec is imported when it is first needed, as is its package for the kind of URL (s3fs,
gcsfs, aiohttp); credentials come from where those look for them. Called in the loader process.
"""

import contextlib
import hashlib
import importlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from multilora.adapters.sources.files import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_BYTES,
    MAX_JSON_BYTES,
    WEIGHTS_NAME,
    parse_json_object,
    show,
)
from multilora.errors import AdapterError, AdapterInvalid, AdapterNotFound

logger = logging.getLogger(__name__)

URL = re.compile(r"(s3|gs|https?)://[^\s/?#]+/[^\s?#]*")
SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
MAX_BYTES = 64 << 30  # of one adapter
MAX_FILE_BYTES = {CONFIG_NAME: MAX_CONFIG_BYTES, INDEX_NAME: MAX_JSON_BYTES}
CHUNK = 1 << 20
# What says that a file is another one now, in the words of the file systems.
IDENTITY = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "md5Hash", "generation")

OpenUrl = Callable[[str], tuple[Any, str]]
"""URL → (fsspec file system, path in it)."""


def is_remote_url(path: str) -> bool:
    """Chained URLs (`zip::s3://…`), with which fsspec can reach anything, and parent directories are none."""
    return URL.fullmatch(path) is not None and "::" not in path and ".." not in path


class RemoteSource:
    """Adapters below any URL, kept in `cache_dir` (None: multilora's own in the user's cache directory).

    extra: names of files beside an adapter's own, fetched where they exist. open_url: replaces fsspec's own.
    """

    def __init__(
        self,
        cache_dir: Path | None = None,
        extra: Sequence[str] = (),
        open_url: OpenUrl | None = None,
        max_bytes: int = MAX_BYTES,
    ):
        self._cache_dir = cache_dir or _default_cache()
        self._extra = tuple(extra)
        self._open_url = open_url or _open_with_fsspec
        self._max_bytes = max_bytes

    def fetch(self, path: str) -> Path:
        """The local folder with the adapter of URL `path`, downloaded unless this state of it is in the cache.

        Raises AdapterNotFound (no such files), AdapterInvalid (another kind of URL, files that are too large, an
        index that names others), AdapterError (not reachable, not allowed, disk full, a package is missing).
        """
        if not is_remote_url(path):
            raise AdapterInvalid(f"adapter {show(path)}: an s3://, gs://, http:// or https:// URL is expected")
        start = time.monotonic()
        with _explained(path):
            filesystem, base = self._open_url(path)
            filesystem.invalidate_cache()
            state = _State(filesystem, base.rstrip("/"), path.rstrip("/"), self._extra)
            folder = self._cache_dir / state.digest()
            if folder.is_dir():
                return folder
            self._download(state, folder)
        logger.info("adapter %s: %s after %.2f s", path, folder, time.monotonic() - start)
        return folder

    def _download(self, state: "_State", folder: Path) -> None:
        self._cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self._cache_dir))
        try:
            left = self._max_bytes
            for name in state.names:
                left -= state.copy(name, partial / name, left)
            state.check_unchanged()
            _rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class _State:
    """The files of one adapter on its file system, and what they were when they were looked at.

    Raises AdapterNotFound if there is no adapter, AdapterInvalid for an index that names files elsewhere.
    """

    def __init__(self, filesystem: Any, base: str, url: str, extra: Sequence[str]):
        self._url = url
        self._filesystem = filesystem
        self._base = base
        weights = [CONFIG_NAME, WEIGHTS_NAME]
        if self._look(CONFIG_NAME) is None:
            raise AdapterNotFound(f"adapter {show(url)}: no {CONFIG_NAME} there")
        if self._look(WEIGHTS_NAME) is None:
            weights = [CONFIG_NAME, INDEX_NAME, *self._shards()]
        self._seen = {name: self._look(name) for name in (*weights, *extra)}
        for name in weights:
            if self._seen[name] is None:
                raise AdapterNotFound(f"adapter {show(url)}: no {name} there")

    @property
    def names(self) -> list[str]:
        """The files that are there."""
        return [name for name, identity in self._seen.items() if identity is not None]

    def digest(self) -> str:
        """Changes when a file does; where the server says nothing that would tell, it is another one every time."""
        parts = [self._url, *(f"{name}={identity}" for name, identity in sorted(self._seen.items()))]
        if any(identity == "" for identity in self._seen.values()):
            parts.append(str(time.time_ns()))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def copy(self, name: str, target: Path, limit: int) -> int:
        """Download one file. Returns its bytes; raises AdapterInvalid if they are more than `limit`, or than a file
        of this kind may have."""
        limit = min(limit, MAX_FILE_BYTES.get(name, MAX_BYTES))
        size = 0
        with self._filesystem.open(f"{self._base}/{name}", "rb") as remote, target.open("xb") as local:
            while chunk := remote.read(CHUNK):
                size += len(chunk)
                if size > limit:
                    raise AdapterInvalid(f"{name} of adapter {show(self._url)}: more than {limit} bytes")
                local.write(chunk)
        return size

    def check_unchanged(self) -> None:
        """Raise AdapterError if a file is another one than at the first look."""
        self._filesystem.invalidate_cache()
        for name, before in self._seen.items():
            if self._look(name) != before:
                raise AdapterError(f"{name} of adapter {show(self._url)} changed while it was being downloaded")

    def _shards(self) -> list[str]:
        if self._look(INDEX_NAME) is None:
            raise AdapterNotFound(f"adapter {show(self._url)}: no {WEIGHTS_NAME} there")
        with self._filesystem.open(f"{self._base}/{INDEX_NAME}", "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise AdapterInvalid(f"{INDEX_NAME} of adapter {show(self._url)}: more than {MAX_JSON_BYTES} bytes")
        weight_map = parse_json_object(data, INDEX_NAME).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
            raise AdapterInvalid(f"{INDEX_NAME}: weight_map: an object of tensors → files beside it is expected")
        return sorted(set(names))

    def _look(self, name: str) -> str | None:
        """What tells this state of a file from another ("": the server does not say); None: there is no such file."""
        try:
            info = self._filesystem.info(f"{self._base}/{name}")
        except FileNotFoundError:
            return None
        found = [f"{key}={info[key]}" for key in IDENTITY if info.get(key) is not None]
        return "|".join([*found, f"size={info.get('size')}"]) if found else ""


def _rename(partial: Path, folder: Path) -> None:
    """Make a complete folder visible; another thread may have been faster, and what it left is as good."""
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "multilora" / "adapters"


def _open_with_fsspec(url: str) -> tuple[Any, str]:
    """Raises ImportError when fsspec, or its package for this kind of URL, is not installed."""
    core = importlib.import_module("fsspec.core")
    filesystem, path = core.url_to_fs(url)
    return filesystem, path


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Errors of fsspec and of the many packages below it, as AdapterErrors."""
    try:
        yield
    except AdapterError:
        raise
    except ImportError as e:
        package = PACKAGES[url.partition("://")[0]]
        raise AdapterError(f"adapter {show(url)}: needs the packages fsspec and {package}") from e
    except FileNotFoundError as e:
        raise AdapterNotFound(f"adapter {show(url)}: not found: {show(str(e))}") from e
    except PermissionError as e:
        raise AdapterError(f"adapter {show(url)}: access denied: {show(str(e))}") from e
    except Exception as e:  # botocore's, aiohttp's, google's own, and OSError
        raise AdapterError(f"adapter {show(url)}: download failed: {type(e).__name__}: {show(str(e))}") from e
