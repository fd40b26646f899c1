"""What a worker counts, until the supervisor is told: see `Observed`."""

from collections import defaultdict

from multilora.front.observer import Ending, FirstOutput, Observer, Origin
from multilora.front.workers.messages import Observed, TokenTimes
from multilora.logs import RecentLines
from multilora.server.metrics.histogram import Histogram
from multilora.server.metrics.usage import inter_token_histogram


class WorkerEvents(Observer):
    """Observer and `RequestCounter` of a worker. lines: what it has logged."""

    def __init__(self, lines: RecentLines) -> None:
        self._lines = lines
        self._told = 0  # number of the last line that the supervisor has
        self._begin()

    def _begin(self) -> None:
        self._submitted: list[Origin] = []
        self._first: list[tuple[Origin, FirstOutput]] = []
        self._later = defaultdict[Origin, Histogram](inter_token_histogram)
        self._verified = defaultdict[Origin, list[tuple[int, int]]](list)
        self._ended: list[tuple[Origin, Ending]] = []
        self._refused: list[tuple[Origin, str]] = []
        self._http: list[tuple[str, str, int, float]] = []

    def submitted(self, origin: Origin) -> None:
        self._submitted.append(origin)

    def first_output(self, origin: Origin, output: FirstOutput) -> None:
        self._first.append((origin, output))

    def next_output(self, origin: Origin, tokens: int, seconds: float) -> None:
        self._later[origin].observe(seconds / tokens, tokens)

    def verified(self, origin: Origin, drafted: int, accepted: int) -> None:
        self._verified[origin].append((drafted, accepted))

    def ended(self, origin: Origin, ending: Ending) -> None:
        self._ended.append((origin, ending))

    def refused(self, origin: Origin, error: str) -> None:
        self._refused.append((origin, error))

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """See `RequestCounter`."""
        self._http.append((route, method, status, seconds))

    def take(self, call: int | None = None) -> Observed:
        """All that has been counted since the last call. call: see `Observed`."""
        lines = self._lines.after(self._told)
        self._told = lines[-1]["number"] if lines else self._told
        observed = Observed(
            call=call,
            submitted=self._submitted,
            first=self._first,
            later=[(origin, TokenTimes(times.counts, times.sum)) for origin, times in self._later.items()],
            verified=list(self._verified.items()),
            ended=self._ended,
            refused=self._refused,
            http=self._http,
            log=[(line["time"], line["level"], line["message"]) for line in lines],
        )
        self._begin()
        return observed
