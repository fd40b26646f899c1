"""An adapter below a directory, by a name that a client chose: found only where it really lies inside.

Owns the rule on a real file system (symbolic links, spellings of a name); the form of a name is checked before, by
whoever takes names from clients. Reads no file.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from multilora.adapters.sources.directory import DirectorySource, is_encodable
from multilora.adapters.sources.files import CONFIG_NAME
from multilora.errors import AdapterError


def find_inside(root: str, name: str, extra: Sequence[str] = ()) -> Path | None:
    """The real path of the adapter directory `root`/`name`; None if there is none, or if it leads out of `root`.

    It must be a directory with an adapter_config.json; the directory, and every file in it that would be read, lies
    inside the real `root` through all symbolic links. extra: names of other files that the caller will read.
    """
    if not name or os.path.isabs(name) or not is_encodable(name) or os.pardir in Path(name).parts:
        return None
    base = os.path.realpath(os.path.expanduser(root))
    try:
        real = DirectorySource((base,), extra).fetch(os.path.join(base, name))
        found = real != Path(base) and os.path.isfile(real / CONFIG_NAME) and _is_spelt_so(base, name)
    except (AdapterError, OSError):
        return None
    return real if found else None


def _is_spelt_so(root: str, name: str) -> bool:
    """Whether the directories have exactly these names, on a file system that takes other spellings too.

    Listing a directory of many adapters is slow, so it is done only where another spelling leads to the same place.
    """
    parent = root
    for part in Path(name).parts:
        path, other = os.path.join(parent, part), os.path.join(parent, part.swapcase())
        aliased = other != path and os.path.exists(other) and os.path.samefile(path, other)
        if aliased and part not in os.listdir(parent):
            return False
        parent = path
    return True
