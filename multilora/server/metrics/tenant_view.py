"""The part of the metrics that a tenant's key is shown: what is said of its own adapters, and of itself by name.

Everything else, totals too, tells what others do, and is left out: a metric must name the tenant or one of its
adapters to be shown. Called by `collector.py`.
"""

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from multilora.front.access import Caller
from multilora.server.metrics.top_names import RESERVED


class TenantView(Collector):
    """What `metrics` collect, as far as it is the caller's."""

    def __init__(self, metrics: Collector, caller: Caller):
        self._metrics = metrics
        self._caller = caller

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for family in self._metrics.collect():
            kept = [
                sample._replace(labels=labels)
                for sample in family.samples
                if (labels := self._own(sample.labels)) is not None
            ]
            if kept:
                own = Metric(family.name, family.documentation, family.type, family.unit)
                own.samples = kept
                yield own

    def _own(self, labels: dict[str, str]) -> dict[str, str] | None:
        """The labels with the caller's words in them; None: they are not of the caller's affair."""
        caller = self._caller
        adapter, tenant = labels.get("adapter_name"), labels.get("tenant")
        if adapter is None and tenant is None:
            return None
        if tenant is not None and (tenant != caller.tenant.name or tenant in RESERVED):
            return None
        if adapter is None:
            return labels
        return labels | {"adapter_name": caller.shown(adapter)} if caller.owns(adapter) else None
