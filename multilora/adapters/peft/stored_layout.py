"""What adapters that are alike have in common: the same bytes in the config, the same header, a file of one size.

Then nothing but their numbers differs, and where those have no say in what an adapter is, what was found out about
one holds for all. Called by `checkpoint.py` and `loading/loader.py`.
"""

import hashlib
import os
from collections.abc import Iterable
from typing import BinaryIO

from multilora.adapters.adapter import Block, LowRank, StoredLayout
from multilora.adapters.peft.safetensors_file import KNOWN_HEADER_BYTES, SafetensorsFile
from multilora.lora.sites import TABLES


def read_key(config: bytes, file: BinaryIO) -> str | None:
    """The key of an adapter with this config and this file, open at its beginning. None: its header is too long."""
    length = file.read(8)
    count = int.from_bytes(length, "little")
    if count > KNOWN_HEADER_BYTES:
        return None
    return _key(config, length + file.read(count), os.fstat(file.fileno()).st_size)


def stored_layout(config: bytes, files: list[SafetensorsFile], blocks: Iterable[Block]) -> StoredLayout | None:
    """The layout of an adapter, from what has been read of it. None: see `Adapter.stored`.

    Numbers have a say where a table is copied (`modules_to_save` that nobody trained) or tied: whatever is not low
    rank, and tables. That each tensor is used is for the caller to see.
    """
    if len(files) != 1 or not all(isinstance(block, LowRank) and block.module not in TABLES for block in blocks):
        return None
    header, size = files[0].header, files[0].size
    if len(header) - 8 > KNOWN_HEADER_BYTES:
        return None
    tensors = sorted((info.start, info.nbytes) for info in files[0].tensors.values())
    return StoredLayout(_key(config, header, size), tuple(tensors))


def _key(config: bytes, header: bytes, size: int) -> str:
    digest = hashlib.sha256(f"{size} {len(config)} ".encode())
    digest.update(config)
    digest.update(header)
    return digest.hexdigest()
