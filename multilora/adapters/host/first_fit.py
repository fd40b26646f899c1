"""First-fit allocator over a region of memory. Knows offsets only."""


class FirstFit:
    """First-fit allocator over `size` bytes; parts begin at multiples of `align`. Not thread-safe."""

    def __init__(self, size: int, align: int):
        self.size = size
        self._align = align
        self._used: dict[int, int] = {}  # start → size

    def take(self, nbytes: int) -> int | None:
        """Start of a new part of `nbytes`; None: there is no room."""
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
        """Size of the part that begins at `start`; None: there is none."""
        return self._used.get(start)

    def give_back(self, start: int) -> None:
        del self._used[start]
