"""The contract of a source of adapters. A source knows nothing of what is in the files."""

from pathlib import Path
from typing import Protocol


class AdapterSource(Protocol):
    """Brings an adapter's files onto this machine."""

    def fetch(self, path: str) -> Path:
        """The local directory that holds the adapter. May take as long as a download; never returns a partial one.

        Raises AdapterNotFound, AdapterForbidden, or AdapterError when the source cannot be reached.
        """
        ...
