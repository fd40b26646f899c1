"""A histogram that several metrics of different buckets are read from.

An observation is one bisection and three additions (about 0.3 µs), so that one of them for each token costs less than
the token's frame. It belongs to one event loop and is not thread-safe; `prometheus_client` only writes it out.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily


class Histogram:
    """Counts values by the union of the `boundaries` given; `samples` reads it at some of them."""

    def __init__(self, *boundaries: Iterable[float]):
        self._bounds = sorted({float(bound) for bounds in boundaries for bound in bounds})
        self._counts = [0] * (len(self._bounds) + 1)  # the last one: values above every boundary
        self.sum = 0.0

    @property
    def count(self) -> int:
        """The number of observations."""
        return sum(self._counts)

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value` so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def absorb(self, other: "Histogram") -> None:
        """Add the observations of `other`, which has the same boundaries."""
        assert self._bounds == other._bounds  # noqa: SLF001
        self.add(other.counts, other.sum)

    @property
    def counts(self) -> list[int]:
        """How many values each boundary is the next one above, then how many are above all of them."""
        return self._counts

    def add(self, counts: Sequence[int], total: float) -> None:
        """Add the `counts` and the sum of another histogram that has the same boundaries."""
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self.sum += total

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str], bounds: Iterable[float]) -> None:
        """Add it to a metric with these buckets, which must be among the boundaries, and +Inf."""
        cumulative = {}
        below = 0
        for bound, number in zip(self._bounds, self._counts, strict=False):
            below += number
            cumulative[bound] = below
        buckets = [(str(float(bound)), float(cumulative[float(bound)])) for bound in bounds]
        family.add_metric(labels, [*buckets, ("+Inf", float(below + self._counts[-1]))], self.sum)
