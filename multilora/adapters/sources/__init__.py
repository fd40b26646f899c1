"""Adapter sources, and which of them serves a path string.

A directory that exists, and whatever looks like a path (absolute, or starting with `.` or `~`), is a directory;
`scheme://…` is a URL; otherwise `org/name[@revision]`, also written `hf://org/name[@revision]`, is a hub repository.
With --lora-root set, only directories inside a root are served.
"""

import enum
import os
from pathlib import Path

from multilora.adapters.sources.base import AdapterSource
from multilora.adapters.sources.directory import DirectorySource, is_encodable
from multilora.adapters.sources.files import show
from multilora.adapters.sources.hub import HUB_SCHEME, HubSource, is_hub_id
from multilora.adapters.sources.remote import is_url
from multilora.errors import AdapterForbidden, AdapterNotFound

__all__ = ["AdapterSource", "DirectorySource", "HubSource", "SourceKind", "is_path", "resolve", "source_kind"]


class SourceKind(enum.Enum):
    """Where an adapter's files are."""

    DIRECTORY = "directory"
    HUB = "hub"
    URL = "url"


def is_path(path: str) -> bool:
    """Whether the text has the form of a path, so that it is a directory or nothing."""
    return path.startswith(("/", ".", "~")) or not is_encodable(path)


def source_kind(path: str, roots: tuple[str, ...] = ()) -> SourceKind:
    """Where adapter `path` is; looks at the disk. Raises AdapterNotFound for text of another form, AdapterForbidden
    for a hub repository while there are roots."""
    if is_path(path) or os.path.isdir(path):
        return SourceKind.DIRECTORY
    if is_url(path.removeprefix(HUB_SCHEME)):
        return SourceKind.URL
    if not is_hub_id(path.removeprefix(HUB_SCHEME)):
        raise AdapterNotFound(
            f"adapter {show(path)}: no such directory, and not a hub repository (org/name[@revision])"
        )
    if roots:
        raise AdapterForbidden(
            f"adapter {show(path)}: no such directory, and hub repositories are not served while --lora-root is set"
        )
    return SourceKind.HUB


def resolve(path: str, roots: tuple[str, ...] = (), hub: AdapterSource | None = None) -> Path:
    """The local directory with the files of adapter `path`, which may be downloaded first. hub: replaces the default
    hub.

    Raises AdapterNotFound, AdapterForbidden, AdapterInvalid, or AdapterError when the hub cannot be reached.
    """
    match source_kind(path, roots):
        case SourceKind.DIRECTORY:
            return DirectorySource(roots).fetch(path)
        case SourceKind.HUB:
            return (hub or HubSource()).fetch(path.removeprefix(HUB_SCHEME))
        case SourceKind.URL:
            raise AdapterNotFound(f"adapter {show(path)}: only a server or an LLM fetches from URLs")
