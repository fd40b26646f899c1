"""Parts of a region, given out by first fit. Knows offsets only. Called by the loader."""


class FirstFit:
    """Of `size` bytes. Parts begin at multiples of `align`. Not for several threads at once."""

    def __init__(self, size: int, align: int):
        self.size = size
        self._align = align
        self._used: dict[int, int] = {}  # start → size

    def take(self, nbytes: int) -> int | None:
        """Where a part of `nbytes` begins; None: there is no room."""
        at = 0
        for start, size in sorted(self._used.items()):
            if start - at >= nbytes:
                break
            at = -(-(start + size) // self._align) * self._align
        if self.size - at < nbytes:
            return None
        self._used[at] = nbytes
        return at

    def size_of(self, start: int) -> int | None:
        """Of the part that begins there; None: there is none."""
        return self._used.get(start)

    def give_back(self, start: int) -> None:
        del self._used[start]
