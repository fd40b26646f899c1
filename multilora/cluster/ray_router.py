"""The request router of Ray Serve that asks `AdapterRouter`: one in every process that sends requests to replicas.

Serve tells it of replicas, of their reports (`record_routing_stats`), of the end of each request and of deaths. The
request's first argument is the RouteRequest, its second the only replica that it may go to, or None.
"""

import dataclasses
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from multilora.cluster.adapter_router import AdapterRouter, RouterSettings
from multilora.cluster.route_request import ReplicaReport, RouteRequest


@dataclass(frozen=True)
class Heard:
    """What a replica has said beside an answer; see `AdapterRouter.heard`."""

    replica: str
    load: float
    prompt: int


@dataclass(frozen=True)
class PromptRead:
    """The attempt of this number has its first token."""

    number: int


NEWS: deque[Heard | PromptRead] = deque(maxlen=100_000)
"""From the ingress of this process, whose loop is another one; the router reads it before it decides."""


@dataclass
class _Sent:
    """An attempt that was sent and has not ended. prompt: 0 once it is read."""

    replica: str
    cost: float
    prompt: int
    number: int


class AdapterRequestRouter(RequestRouter):  # type: ignore[misc]
    """See `RequestRouter` of Ray Serve. Chosen and not yet ended requests are kept by Serve's id of them."""

    def initialize_state(self, factor: float, slack: float, copies: int) -> None:
        """With `request_router_kwargs`, once."""
        self._router = AdapterRouter(RouterSettings(factor=factor, slack=slack, copies=copies))
        self._sent: dict[str, _Sent] = {}
        self._numbers: dict[int, _Sent] = {}
        self._reports: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """There are these, with their latest reports."""
        super().update_replicas(replicas)
        self._router.set_replicas({replica.replica_id.unique_id: 1.0 for replica in replicas})
        for replica in replicas:
            name, stats = replica.replica_id.unique_id, replica.routing_stats
            if stats and self._reports.get(name) != stats.get("number"):
                self._reports[name] = stats.get("number")
                self._sizes.update(stats["sizes"])
                room, prompt = stats["room"], stats["prompt"]
                report = ReplicaReport(stats["load"], 1.0, stats["device"], stats["host"], room, prompt)
                self._router.report(name, report, self._sizes)
        for gone in self._reports.keys() - {replica.replica_id.unique_id for replica in replicas}:
            del self._reports[gone]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one replica that is best, or none."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if pending_request is None or not pending_request.args:
            return [list(by_name.values())]
        request, only = pending_request.args[:2]
        if only is not None:
            return [[by_name[only]]] if only in by_name else [candidate_replicas]  # who will say that it is not he
        return [self._choose(request, pending_request.metadata.internal_request_id, by_name)]

    def _choose(
        self, request: RouteRequest, request_id: str, by_name: dict[str, RunningReplica]
    ) -> list[RunningReplica]:
        self._end(request_id)  # it was chosen for before, and the replica did not take it
        self._read_news()
        request = with_size(request, self._sizes)
        choice = self._router.choose(request) or self._router.choose(_anywhere(request))
        if choice is None:
            return []
        sent = _Sent(choice.replica, request.cost, request.prompt, request.number)
        self._sent[request_id] = self._numbers[sent.number] = sent
        return [by_name[choice.replica]] if choice.replica in by_name else []

    def _end(self, request_id: str) -> None:
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            self._numbers.pop(sent.number, None)
            self._router.prompt_read(sent.replica, sent.prompt)
            self._router.ended(sent.replica, sent.cost)

    def _read_news(self) -> None:
        while NEWS:
            news = NEWS.popleft()
            if isinstance(news, Heard):
                self._router.heard(news.replica, news.load, news.prompt)
            elif (sent := self._numbers.get(news.number)) is not None:
                self._router.prompt_read(sent.replica, sent.prompt)
                sent.prompt = 0

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """However it ended."""
        super().on_request_completed(replica_id, internal_request_id)
        self._end(internal_request_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Nothing is sent there any more."""
        super().on_replica_actor_died(replica_id)
        self._router.remove(replica_id.unique_id)


def _anywhere(request: RouteRequest) -> RouteRequest:
    """All replicas have failed it: any may try again."""
    return dataclasses.replace(request, avoid=frozenset())


def with_size(request: RouteRequest, sizes: Mapping[str, int]) -> RouteRequest:
    """The request, with what its adapter takes where that is known."""
    need = request.adapter
    if need is None or need.nbytes or need.name not in sizes:
        return request
    return dataclasses.replace(request, adapter=dataclasses.replace(need, nbytes=sizes[need.name]))
