"""Adapters at http(s), s3 and gs URLs: `URL/adapter_config.json` and the other files of an adapter directory.

It owns the form of such a URL and of the names that may be appended to one. Files are asked for by name, so nothing
needs to be listed. HTTP is read by the standard library, and a redirect is not followed: it could lead anywhere;
other schemes need `fsspec` and its file systems (`pip install multilora[remote]`), whose environment variables work
as everywhere else. Called by `download.py`, in a process of its own.
"""

import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from multilora.adapters.sources.copying import Allowance, Readable, copy_file
from multilora.adapters.sources.files import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, read_index, show
from multilora.errors import AdapterError, AdapterNotFound

SCHEMES = ("http", "https", "s3", "gs")
SOCKET_SECONDS = 30  # of silence; the whole download has a deadline besides
ABSENT = (403, 404, 410)  # buckets that may not be listed answer 403 for a file that is not there

_NAME = re.compile(r"[A-Za-z0-9_][\w.@+=-]*(/[A-Za-z0-9_][\w.@+=-]*)*", re.ASCII)

OpenFile = Callable[[str], AbstractContextManager[Readable] | None]
"""The file of that name beside the others; None: there is none."""


def is_url(path: str) -> bool:
    """Whether the path has the form scheme://…"""
    return "://" in path


def is_served(url: str) -> bool:
    """Whether adapters can be fetched from such a URL: a known scheme, a host or bucket, no query or fragment, and no
    `::`, by which fsspec chains URLs."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in SCHEMES and bool(parts.netloc) and not parts.query + parts.fragment and "::" not in url


def is_below(url: str, prefix: str) -> bool:
    """Whether the URL is `prefix`, a slash and a name that means the same to every server: letters, digits and
    `_ . @ + = -`, with slashes between parts that do not begin with a dot."""
    prefix = prefix.rstrip("/") + "/"
    return url.startswith(prefix) and _NAME.fullmatch(url[len(prefix) :]) is not None


def fetch_url(url: str, target: Path, extra: Sequence[str], allowance: Allowance) -> None:
    """Copy the files of the adapter at `url` into the directory `target`. extra: names of files beside its own.

    Raises AdapterNotFound if there is none, AdapterIncompatible over the bytes, else AdapterError.
    """
    open_file = _http(url) if urlsplit(url).scheme in ("http", "https") else _file_system(url)

    def fetch(name: str) -> bool:
        try:
            source = open_file(name)
            if source is None:
                return False
            with source as readable:
                copy_file(readable, target / name, allowance)
        except AdapterError:
            raise
        except Exception as e:  # each file system has errors of its own
            raise AdapterError(f"{show(url)}: {name} cannot be fetched: {type(e).__name__}: {show(str(e))}") from e
        return True

    if not fetch(CONFIG_NAME):
        raise AdapterNotFound(f"{show(url)}: there is no {CONFIG_NAME}")
    if not fetch(WEIGHTS_NAME):
        if not fetch(INDEX_NAME):
            raise AdapterNotFound(f"{show(url)}: there is no {WEIGHTS_NAME}")
        for name in sorted(set(read_index(target / INDEX_NAME).values())):
            if not fetch(name):
                raise AdapterNotFound(f"{show(url)}: {show(name)}, named in {INDEX_NAME}, is missing")
    for name in extra:
        fetch(name)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect the error that it is here."""

    def redirect_request(self, *_: Any) -> None:
        """No request follows."""


def _http(url: str) -> OpenFile:
    opener = urllib.request.build_opener(_NoRedirect)

    def open_file(name: str) -> AbstractContextManager[Readable] | None:
        try:
            response: AbstractContextManager[Readable] = opener.open(
                f"{url.rstrip('/')}/{name}", None, SOCKET_SECONDS
            )
        except urllib.error.HTTPError as e:
            e.close()
            if e.code in ABSENT:
                return None
            raise AdapterError(f"{show(url)}: {name}: HTTP status {e.code}") from None
        return response

    return open_file


def _file_system(url: str) -> OpenFile:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        system, root = url_to_fs(url)
    except ImportError as e:
        raise AdapterError(f"{show(url)}: {e}: pip install 'multilora[remote]'") from None

    def open_file(name: str) -> AbstractContextManager[Readable] | None:
        try:
            file: AbstractContextManager[Readable] = system.open(f"{root.rstrip('/')}/{name}", "rb")
        except (FileNotFoundError, PermissionError):
            return None
        return file

    return open_file
