"""What a worker counts, until the supervisor is told: see `Observed`."""

from collections import defaultdict

from multilora.front.observer import Ending, FirstOutput, Observer, Origin
from multilora.front.workers.messages import Observed


class WorkerEvents(Observer):
    """Observer and `RequestCounter` of a worker."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._submitted: list[Origin] = []
        self._first: list[tuple[Origin, FirstOutput]] = []
        self._later = defaultdict[Origin, list[tuple[int, float]]](list)
        self._ended: list[tuple[Origin, Ending]] = []
        self._refused: list[tuple[Origin, str]] = []
        self._http: list[tuple[str, str, int, float]] = []

    def submitted(self, origin: Origin) -> None:
        self._submitted.append(origin)

    def first_output(self, origin: Origin, output: FirstOutput) -> None:
        self._first.append((origin, output))

    def next_output(self, origin: Origin, tokens: int, seconds: float) -> None:
        self._later[origin].append((tokens, seconds))

    def ended(self, origin: Origin, ending: Ending) -> None:
        self._ended.append((origin, ending))

    def refused(self, origin: Origin, error: str) -> None:
        self._refused.append((origin, error))

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """See `RequestCounter`."""
        self._http.append((route, method, status, seconds))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to say."""
        kept = (self._submitted, self._first, self._later, self._ended, self._refused, self._http)
        return not any(kept)

    def take(self, call: int | None = None) -> Observed:
        """All that has been counted since the last call. call: see `Observed`."""
        observed = Observed(
            call=call,
            submitted=self._submitted,
            first=self._first,
            later=list(self._later.items()),
            ended=self._ended,
            refused=self._refused,
            http=self._http,
        )
        self._begin()
        return observed
