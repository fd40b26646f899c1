"""Copying the files of one adapter, within bounds: so many bytes in all, until a moment in time.

Called by `inside.py` and `remote.py`.
"""

import time
from pathlib import Path
from typing import Protocol

from multilora.adapters.sources.files import show
from multilora.errors import AdapterIncompatible, AdapterUnavailable, StorageFailed

CHUNK = 4 << 20  # bytes


class Readable(Protocol):
    """An open file or the body of a response."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


class Allowance:
    """What one fetch may still take: `max_bytes` in all (None: any number), until `deadline` (time.monotonic)."""

    def __init__(self, deadline: float, max_bytes: int | None = None):
        self.deadline = deadline
        self.max_bytes = max_bytes
        self.nbytes = 0

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    def take(self, nbytes: int) -> None:
        """Count `nbytes` more. Raises AdapterIncompatible over the bytes, AdapterUnavailable over the time."""
        self.nbytes += nbytes
        if self.max_bytes is not None and self.nbytes > self.max_bytes:
            raise AdapterIncompatible(f"incompatible: the adapter's files have over {self.max_bytes} bytes")
        if self.seconds_left < 0:
            raise AdapterUnavailable("the adapter's files could not be fetched in time")


def copy_file(source: Readable, target: Path, allowance: Allowance) -> None:
    """Write all of `source` to the new file `target`. Raises StorageFailed if the disk refuses, and what `take` and
    `source` raise."""
    try:
        out = target.open("xb", buffering=0)
    except OSError as e:
        raise StorageFailed(f"{show(target.name)} could not be kept: {e.strerror}") from e
    with out:
        while chunk := source.read(CHUNK):
            allowance.take(len(chunk))
            try:
                view = memoryview(chunk)
                while view:
                    view = view[out.write(view) :]
            except OSError as e:
                raise StorageFailed(f"{show(target.name)} could not be kept: {e.strerror}") from e
