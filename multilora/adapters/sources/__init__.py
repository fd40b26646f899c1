"""Adapter sources, and which of them serves a path string.

A directory that exists, and whatever looks like a path (absolute, or starting with `.` or `~`), is a directory;
otherwise `org/name[@revision]` is a hub repository. With --lora-root set, only directories inside a root are served.
"""

import os
from pathlib import Path

from multilora.adapters.sources.base import AdapterSource
from multilora.adapters.sources.directory import DirectorySource, is_encodable
from multilora.adapters.sources.files import show
from multilora.adapters.sources.hub import HubSource, is_hub_id
from multilora.errors import AdapterForbidden, AdapterNotFound

__all__ = ["AdapterSource", "DirectorySource", "HubSource", "resolve"]


def resolve(
    path: str, roots: tuple[str, ...] = (), hub: AdapterSource | None = None, extra: tuple[str, ...] = ()
) -> Path:
    """The local directory with the files of adapter `path`, which may be downloaded first.

    hub: replaces the default hub; extra: names of other files that the caller will read if they are there.

    Raises AdapterNotFound, AdapterForbidden, AdapterInvalid, or AdapterError when the hub cannot be reached.
    """
    if path.startswith(("/", ".", "~")) or not is_encodable(path) or os.path.isdir(path):
        return DirectorySource(roots, extra).fetch(path)
    if not is_hub_id(path):
        raise AdapterNotFound(
            f"adapter {show(path)}: no such directory, and not a hub repository (org/name[@revision])"
        )
    if roots:
        raise AdapterForbidden(
            f"adapter {show(path)}: no such directory, and hub repositories are not served while --lora-root is set"
        )
    return (hub or HubSource(extra=extra)).fetch(path)
