"""All metrics of one server, as /metrics shows them.

Names that other tools read are the peers' (`vllm.py`, `sglang.py`, `http.py`); ours begin with `multilora:`.
Label `adapter_name` is the adapter's name, the base model's name for requests without one; all that have no label of
their own are `other` (`top_names.py`). With tenants there are the same numbers by `tenant`. Each `Metrics` has a
CollectorRegistry to itself, so that several servers fit one process.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from multilora.config import Config
from multilora.front.access import CALLER
from multilora.front.engine_link import EngineLink
from multilora.front.observer import Ending, FirstOutput, Observer, Origin
from multilora.front.registry import AdapterRegistry
from multilora.front.workers.messages import Observed
from multilora.server.metrics.adapters import AdapterCounts, adapter_metrics, routing_metrics
from multilora.server.metrics.http import HttpCounts
from multilora.server.metrics.own import own_metrics
from multilora.server.metrics.sglang import sglang_metrics
from multilora.server.metrics.tenant_view import TenantView
from multilora.server.metrics.top_names import TopNames
from multilora.server.metrics.totals import Totals
from multilora.server.metrics.usage import Usage, usage_metrics
from multilora.server.metrics.vllm import vllm_metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Observer):
    """What the front reports, counted over all requests (`totals`), by adapter and by tenant; `http`: by route."""

    def __init__(self, config: Config, context_length: int):
        self.http = HttpCounts()
        self._config = config
        self._model_name = config.model_name
        self._context_length = context_length
        self._adapters = TopNames(config.max_metrics_labels, Usage)
        self.totals = Totals(context_length, self._adapters)
        self._tenants = TopNames(config.max_metrics_labels, Usage) if config.auth_file is not None else None
        self._registry = CollectorRegistry()
        self._registry.register(self.http)
        ProcessCollector(registry=self._registry)  # of this process, the front
        self._registry.register(_UsageCollector(self._adapters, self._tenants))
        self._resolved = Counter(
            "multilora:resolver_events",
            "Unknown adapter names looked for (hit, miss, failure), and adapters unloaded for them (eviction)",
            ["event"],
            registry=self._registry,
        )
        for event in ("hit", "miss", "failure", "eviction"):
            self._resolved.labels(event)

    def watch(self, names: AdapterRegistry, engine: EngineLink) -> None:
        """Show the engine's state too, as it said last."""
        self._registry.register(
            _StateCollector(self._config, self._context_length, self.totals, self._adapters, names, engine)
        )

    def submitted(self, origin: Origin) -> None:
        self._adapters.use(origin.adapter or self._model_name).started += 1
        if self._tenants is not None:
            self._tenants.use(origin.tenant).started += 1

    def first_output(self, origin: Origin, output: FirstOutput) -> None:
        self.totals.first_output(output)
        for usage in self._of(origin):
            usage.first_output(output)

    def next_output(self, origin: Origin, tokens: int, seconds: float) -> None:
        self._adapters.find(origin.adapter or self._model_name).next_output(tokens, seconds)
        if self._tenants is not None:
            self._tenants.find(origin.tenant).next_output(tokens, seconds)

    def verified(self, origin: Origin, drafted: int, accepted: int) -> None:
        self.totals.drafts.count(drafted, accepted)
        for usage in self._of(origin):
            usage.drafts.count(drafted, accepted)

    def ended(self, origin: Origin, ending: Ending) -> None:
        self.totals.ended(ending)
        for usage in self._of(origin):
            usage.ended(ending)

    def refused(self, origin: Origin, error: str) -> None:
        for usage in self._of(origin):
            usage.errors[error] += 1

    def add_observed(self, observed: Observed) -> None:
        """Count what another front process has seen."""
        for origin in observed.submitted:
            self.submitted(origin)
        for origin, output in observed.first:
            self.first_output(origin, output)
        for origin, times in observed.later:
            for usage in self._of(origin):
                usage.next_outputs(times)
        for origin, drafts in observed.verified:
            for drafted, accepted in drafts:
                self.verified(origin, drafted, accepted)
        for origin, ending in observed.ended:
            self.ended(origin, ending)
        for origin, error in observed.refused:
            self.refused(origin, error)
        for answered in observed.http:
            self.http.count(*answered)

    def _of(self, origin: Origin) -> tuple[Usage, ...]:
        """The series of the request. It may have lost its label since it was submitted, and gets none here."""
        of_adapter = self._adapters.find(origin.adapter or self._model_name)
        return (of_adapter,) if self._tenants is None else (of_adapter, self._tenants.find(origin.tenant))

    def forget(self, adapter: str) -> None:
        """The adapter was unloaded: its label goes."""
        self._adapters.forget(adapter)

    def resolved(self, event: str) -> None:
        self._resolved.labels(event).inc()

    def render(self) -> bytes:
        """The text format of Prometheus, of what the present caller may see."""
        self._adapters.rank()
        if self._tenants is not None:
            self._tenants.rank()
        caller = CALLER.get()
        if not caller.tenant.name:
            return generate_latest(self._registry)
        return generate_latest(TenantView(self._registry, caller))


class _UsageCollector(Collector):
    """Shows what the front has counted by adapter and by tenant."""

    def __init__(self, adapters: TopNames[Usage], tenants: TopNames[Usage] | None):
        self._adapters = adapters
        self._tenants = tenants

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from usage_metrics("multilora:", "adapter_name", self._adapters)
        if self._tenants is not None:
            yield from usage_metrics("multilora:tenant_", "tenant", self._tenants)


class _StateCollector(Collector):
    """Turns the engine's `Stats` and the `Totals` into metrics when asked."""

    def __init__(
        self,
        config: Config,
        context_length: int,
        totals: Totals,
        usage: TopNames[Usage],
        registry: AdapterRegistry,
        engine: EngineLink,
    ):
        self._config = config
        self._context_length = context_length
        self._totals = totals
        self._usage = usage
        self._counts = AdapterCounts(usage)
        self._names = registry
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        adapters = [(name, a) for a in stats.adapters if (name := self._names.name_of(a.version)) is not None]
        yield from own_metrics(stats, self._engine.restarts)
        yield from vllm_metrics(self._config, self._totals, stats)
        yield from sglang_metrics(self._config, self._totals, stats, self._context_length)
        yield from routing_metrics(stats, adapters, self._config.max_loras_per_batch)
        self._counts.update(adapters)
        yield from adapter_metrics(adapters, self._usage)
