"""First-fit allocator of intervals. It knows offsets only, not what lies there; not thread-safe."""


class FirstFit:
    """Intervals of [0, size) that begin at multiples of `align`; the unit (bytes, entries) is the caller's."""

    def __init__(self, size: int, align: int = 1):
        self.size = size
        self._align = align
        self._used: dict[int, int] = {}  # start → length

    def take(self, length: int) -> int | None:
        """Where an interval of `length` ≥ 1 begins, in the first gap that holds it; None: no gap does."""
        assert length > 0
        at = 0  # invariant: [at, start) is free
        for start, used in sorted(self._used.items()):
            if start - at >= length:
                break
            at = -(-(start + used) // self._align) * self._align
        if self.size - at < length:
            return None
        self._used[at] = length
        return at

    def length_of(self, start: int) -> int | None:
        """The length of the interval that begins there; None: none does."""
        return self._used.get(start)

    def give_back(self, start: int) -> None:
        """Free the interval that begins at `start`. KeyError: none does."""
        del self._used[start]

    def compact(self) -> dict[int, int]:
        """Close all gaps, keeping the order. Returns old start → new start; the caller moves what lies there."""
        moved, at = {}, 0
        for start, used in sorted(self._used.items()):
            moved[start] = at
            at = -(-(at + used) // self._align) * self._align
        self._used = {moved[start]: used for start, used in self._used.items()}
        return moved
