"""How a GPU packs an adapter from the bytes of its file, in plain types: a process of the loader makes it, the copier
reads it. Called by `packing/placed_jobs.py`, `loading/loader.py`, `host/mapping.py` and `device/packing.py`.
"""

import msgspec

TABLE_WORDS = 8
PART_BYTES = 16 << 20
"""What a GPU packs at a time."""
HALF = ("bfloat16", "float16")


class PackTable(msgspec.Struct, frozen=True):
    """How a GPU packs an adapter from the bytes of its file's tensors.

    stored, dtype: of the numbers before and after, two bytes each. rows: int64 [stretches, TABLE_WORDS] as bytes:
    first element of the source, counted from its part; elements between rows, and between columns, there; rows;
    columns; first element in the pages; scaling (the bits of a fp32); rows with those of zeros that follow. nbytes:
    of the tensors. parts: first byte, bytes, first row of the table and how many, of what is copied and packed
    at a time.
    """

    stored: str
    dtype: str
    rows: bytes
    nbytes: int
    parts: list[tuple[int, int, int, int]]
