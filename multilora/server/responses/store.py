"""The responses that clients can come back to, in memory: bounded by number and bytes, lost when the server ends.

Each tenant has its own: what another one has stored is unknown. Of the tenant with most bytes the least recently used
ones that have ended leave first; those that run stay. Knows nothing of HTTP.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from multilora.errors import UnknownResponse
from multilora.front.access import CALLER
from multilora.server.responses.event_log import EventLog
from multilora.server.responses.run import ResponseRun

MAX_RESPONSES = 10_000
MAX_BYTES = 256 << 20
"""The bound of all ended responses as JSON, each with the conversation before it."""


Key = tuple[str, str]
"""The tenant's name, and the id of a response or an output item."""


@dataclass
class StoredResponse:
    """run: until the response has ended; from then on `ended` is the response object.

    items: the conversation of the response, its own output included once it has ended. nbytes: of these and of the
    log, as JSON. log: its events, if it was begun as a stream in the background.
    """

    run: ResponseRun | None
    items: list[Any]
    nbytes: int
    log: EventLog | None = None
    ended: dict[str, Any] = field(default_factory=dict)

    @property
    def input_items(self) -> list[Any]:
        """What the response answers: all of the conversation before its own output."""
        return self.items[: len(self.items) - len(self.ended.get("output", ()))]

    def response(self) -> dict[str, Any]:
        """The response object as it stands."""
        return self.run.response() if self.run else self.ended


class ResponseStore:
    """max_count, max_bytes: bounds of what has ended."""

    def __init__(self, max_count: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._running: dict[Key, StoredResponse] = {}
        self._ended: OrderedDict[Key, StoredResponse] = OrderedDict()  # least recently used first
        self._bytes = Counter[str]()  # of the ended ones, by tenant
        self._output: dict[Key, dict[str, Any]] = {}  # of the ended ones

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    def add(
        self, response_id: str, run: ResponseRun, items: list[Any], nbytes: int, log: EventLog | None = None
    ) -> None:
        """Keep a response that runs."""
        self._running[own_key(response_id)] = StoredResponse(run, items, nbytes, log)

    def get(self, response_id: str) -> StoredResponse:
        """The response, used now. Raises UnknownResponse."""
        key = own_key(response_id)
        if key in self._ended:
            self._ended.move_to_end(key)
            return self._ended[key]
        if key not in self._running:
            raise UnknownResponse(f"Response with id {response_id!r:.100} not found.", param="response_id")
        return self._running[key]

    def item(self, item_id: Any) -> dict[str, Any] | None:
        """The output item of a response that has ended; None: there is none with this id, or not any more."""
        return self._output.get(own_key(item_id)) if isinstance(item_id, str) else None

    def settle(self, key: Key) -> None:
        """The response has ended: keep what it came to, within the bounds. One that was discarded stays unknown."""
        stored = self._running.pop(key, None)
        if stored is None:
            return
        tenant = key[0]
        stored.ended, stored.run = stored.response(), None
        stored.items = [*stored.items, *stored.ended["output"]]
        stored.nbytes += json_bytes(stored.ended)
        if stored.log is not None:  # its last event, which shows the response again, is still to come
            stored.nbytes += stored.log.nbytes + json_bytes(stored.ended)
        self._output |= {(tenant, item["id"]): item for item in stored.ended["output"]}
        self._ended[key] = stored
        self._bytes[tenant] += stored.nbytes
        while len(self._ended) > self._max_count or self._bytes.total() > self._max_bytes:
            ((largest, _),) = self._bytes.most_common(1)
            self._forget(next(key for key in self._ended if key[0] == largest))

    def discard(self, response_id: str) -> None:
        """Forget the response, if it is known."""
        self._forget(own_key(response_id))

    def _forget(self, key: Key) -> None:
        self._running.pop(key, None)
        stored = self._ended.pop(key, None)
        if stored is not None:
            self._bytes[key[0]] -= stored.nbytes
            for item in stored.ended["output"]:
                del self._output[key[0], item["id"]]


def own_key(response_id: str) -> Key:
    """The response of this id that is the present caller's tenant's."""
    return CALLER.get().tenant.name, response_id


def json_bytes(value: Any) -> int:
    """The length of `value` as JSON."""
    return len(msgspec.json.encode(value))
