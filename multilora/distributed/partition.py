"""How a width is divided among ranks: in blocks of whole units, or in blocks that are padded to the same size.

Every rank's part is equally wide, so that page layouts and tables are the same on all ranks. Knows no modules.
"""

VOCAB_GRANULE = 16
"""The part of a vocabulary is a multiple of this, for the sake of kernels."""


def even_part(width: int, rank: int, size: int) -> range:
    """Block number `rank` of `size` equal ones. Raises ValueError if they cannot be equal."""
    if width % size:
        raise ValueError(f"{width} cannot be divided into {size} equal parts")
    each = width // size
    return range(rank * each, (rank + 1) * each)


def unit_part(width: int, unit: int, rank: int, size: int, *, replicate: bool = False) -> range:
    """Block number `rank` of whole units of `unit` columns. With `replicate`, fewer units than ranks are held by
    several ranks each, neighbours. Raises ValueError if that does not come out even."""
    units = width // unit
    if replicate and units < size and size % units == 0:
        held = range(rank * units // size, rank * units // size + 1)
    elif units % size:
        raise ValueError(f"{units} x {unit} columns cannot be divided into {size} equal parts")
    else:
        held = even_part(units, rank, size)
    return range(held.start * unit, held.stop * unit)


def block_parts(width: int, blocks: int, unit: int, rank: int, size: int) -> tuple[range, ...]:
    """Part number `rank` of each of `blocks` equal blocks that lie behind each other, in whole units of `unit`.
    Raises ValueError if that does not come out even."""
    each, rest = divmod(width, blocks)
    if rest or each % unit:
        raise ValueError(f"{width} is not {blocks} equal blocks of whole units of {unit}")
    held = even_part(each // unit, rank, size)
    return tuple(range(b * each + held.start * unit, b * each + held.stop * unit) for b in range(blocks))


def padded_size(width: int, size: int) -> int:
    """How wide each rank's part is, padding included, where `width` is cut into parts of a common size."""
    each = -(-width // size)
    return each if size == 1 else -(-each // VOCAB_GRANULE) * VOCAB_GRANULE


def padded_part(width: int, rank: int, size: int) -> range:
    """What part number `rank` holds without the padding, which is at its end; the last parts may be empty."""
    each = padded_size(width, size)
    return range(min(width, rank * each), min(width, (rank + 1) * each))
