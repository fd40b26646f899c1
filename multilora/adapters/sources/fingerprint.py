"""Whether an adapter's files are the ones that were read before: by what they hold, or by which files they are.

It knows nothing of PEFT's fields or of tensors. Called by `peft/`.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import xxhash

from multilora.adapters.sources.files import MAX_JSON_BYTES, find_files, open_regular
from multilora.adapters.thread_pool import ALONE, ReaderPool

PART_BYTES = 2 << 20  # are digested at once, while they are in a core's cache; another size gives other fingerprints
SCHEME = "2:"  # what fingerprints begin with; others are of earlier ways to make them


def fingerprint(directory: Path, readers: ReaderPool = ALONE) -> str:
    """A digest of what the adapter's files hold, and of their names and order: it stays when they are touched, copied
    or written again as they were. Parts of the files are read on the threads of `readers`: one thread takes about
    15 ms for 100 MB that are in memory.

    xxh3 of 128 bits tells versions apart that were not made to be mistaken for each other. Raises what `find_files`
    raises, and OSError.
    """
    with contextlib.ExitStack() as stack:
        files = [(path.name, stack.enter_context(open_regular(path)).fileno()) for path in find_files(directory).all]
        parts = [(fd, start) for _, fd in files for start in range(0, os.fstat(fd).st_size, PART_BYTES)]
        digests = [b""] * len(parts)

        def digest(number: int) -> None:
            digests[number] = _digest_of(*parts[number])

        readers.each(digest, range(len(parts)))
        return combined([(name, os.fstat(fd).st_size) for name, fd in files], digests)


def combined(files: Sequence[tuple[str, int]], digests: Iterable[bytes]) -> str:
    """The fingerprint of files of these names and sizes. digests: of their parts of PART_BYTES, file after file."""
    whole = xxhash.xxh3_128()
    for name, size in files:
        whole.update(f"{name}\0{size}\0".encode())
    for digest in digests:
        whole.update(digest)
    return SCHEME + whole.hexdigest()


def part_digest(*pieces: bytes | memoryview) -> bytes:
    """The digest of one part of a file, which is in memory, in these pieces."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _digest_of(fd: int, start: int) -> bytes:
    """The same of the part of a file that begins at `start`."""
    view, got = memoryview(bytearray(PART_BYTES)), 0
    while more := os.preadv(fd, [view[got:]], start + got):
        got += more
    return part_digest(view[:got])


def identity(directory: Path) -> str:
    """A digest that changes when a file is written or replaced: of name, size, mtime, inode and header of each.

    It takes microseconds, and misses what is written in place within one tick of the file system's clock. Raises what
    `find_files` raises.
    """
    digest = hashlib.sha256()
    for path in find_files(directory).all:
        with open_regular(path) as file:
            info = os.fstat(file.fileno())
            digest.update(f"{path.name}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ino}\0".encode())
            is_json = path.suffix != ".safetensors"
            digest.update(file.read(MAX_JSON_BYTES if is_json else _header_bytes(file, info.st_size)))
    return digest.hexdigest()


def _header_bytes(file: BinaryIO, size: int) -> int:
    """How many bytes of a safetensors file from its current position, 0, belong to the header (at most 16 MB)."""
    length = int.from_bytes(file.read(8), "little")
    return min(length, size, MAX_JSON_BYTES)
