"""What it costs to verify drafts, learnt from steps without prompts: those that had drafts and those that had not.

Medians of the latest few, not means: a step that compiles a kernel must not decide for long. Called by
`speculation.py`.
"""

from collections import deque
from statistics import median

KEPT = 9  # steps of each kind
ENOUGH = 3  # before which nothing is known of a kind


class VerifyCost:
    """seconds(n drafted tokens) = plain + fixed + per_token x n."""

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=KEPT)
        self._verified: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self._line: tuple[float, float] | None = None
        self._slope: float | None = None  # the latest

    def observe(self, drafted: int, seconds: float) -> None:
        """A step with so many drafted tokens beside its decodes has taken `seconds`."""
        if drafted:
            self._verified.append((drafted, seconds))
        else:
            self._plain.append(seconds)
        self._line = None

    @property
    def known(self) -> bool:
        """Whether enough plain steps have run to compare others with them."""
        return len(self._plain) >= ENOUGH and self.plain > 0

    @property
    def measured(self) -> bool:
        """Whether enough steps with drafts have run to say what those cost."""
        return len(self._verified) >= ENOUGH

    @property
    def observed(self) -> int:
        """How many of the latest steps had drafts."""
        return len(self._verified)

    @property
    def plain(self) -> float:
        """Seconds of a step without drafts."""
        return median(self._plain)

    @property
    def fixed(self) -> float:
        """Seconds that the first drafted token costs beside `per_token`; 0 as long as little is known."""
        return self._fitted()[0]

    @property
    def per_token(self) -> float:
        """Seconds that one more drafted token costs. Steps that all have the same number do not tell: it stays what
        it was, or it is all that they cost."""
        return self._fitted()[1]

    def _fitted(self) -> tuple[float, float]:
        if self._line is None:
            self._line = self._fit() if self.measured else (0.0, 0.0)
        return self._line

    def _fit(self) -> tuple[float, float]:
        """The slope is the median of those between any two steps (Theil, Sen)."""
        steps = list(self._verified)
        slopes = [(t - s) / (n - m) for i, (m, s) in enumerate(steps) for n, t in steps[i + 1 :] if n != m]
        if slopes:
            self._slope = max(0.0, median(slopes))
        slope = self._slope
        if slope is None:
            slope = max(0.0, median([s for _, s in steps]) - self.plain) / steps[0][0]
        return max(0.0, median([s - slope * n for n, s in steps]) - self.plain), slope
