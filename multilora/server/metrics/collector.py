"""All metrics of one server, as /metrics shows them.

Names that other tools read are the peers' (`vllm.py`, `sglang.py`, `http.py`); ours begin with `multilora:`.
Label `adapter_name` is the adapter's name, the base model's name for requests without one; a composition counts for
each of its adapters, what the front counts of a named one for that name. Each `Metrics` has its own
CollectorRegistry, so that several servers fit one process.
"""

import contextlib
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from multilora.config import Config
from multilora.front.access import CALLER
from multilora.front.adapter_spec import AdapterSpec
from multilora.front.engine_link import EngineLink
from multilora.front.observer import Ending, FirstOutput, Observer
from multilora.front.registry import AdapterRegistry
from multilora.server.metrics.adapters import PER_ADAPTER, adapter_metrics, routing_metrics
from multilora.server.metrics.http import HttpCounts
from multilora.server.metrics.own import own_metrics
from multilora.server.metrics.sglang import sglang_metrics
from multilora.server.metrics.tenant_view import TenantView
from multilora.server.metrics.totals import Totals
from multilora.server.metrics.vllm import vllm_metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics(Observer):
    """What the front reports, counted over all adapters (`totals`) and for each; `http`: requests by route."""

    def __init__(self, config: Config, context_length: int):
        self.totals = Totals(context_length)
        self.http = HttpCounts()
        self._config = config
        self._context_length = context_length
        self._registry = CollectorRegistry()
        self._registry.register(self.http)
        ProcessCollector(registry=self._registry)  # of this process, the front
        self._requests = Counter(
            "multilora:requests", "Requests ended", [*PER_ADAPTER, "finish_reason"], registry=self._registry
        )
        self._started = self._counter("requests_started", "Requests submitted to the engine")
        self._tokens_in = self._counter("prompt_tokens", "Prompt tokens of ended requests")
        self._tokens_out = self._counter("generation_tokens", "Generated tokens of ended requests")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first output")
        self._queued = self._histogram("queue_time_seconds", "From submission to the first step")
        self._resolved = Counter(
            "multilora:resolver_events",
            "Unknown adapter names looked for (hit, miss, failure), and adapters unloaded for them (eviction)",
            ["event"],
            registry=self._registry,
        )
        for event in ("hit", "miss", "failure", "eviction"):
            self._resolved.labels(event)
        self._seen: dict[str, set[str]] = {}  # adapter → finish reasons

    def watch(self, names: AdapterRegistry, engine: EngineLink) -> None:
        """Show the engine's state too, as it said last."""
        self._registry.register(_StateCollector(self._config, self._context_length, self.totals, names, engine))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"multilora:{name}", text, PER_ADAPTER, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"multilora:{name}", text, PER_ADAPTER, registry=self._registry, buckets=_SECONDS)

    def submitted(self, adapters: AdapterSpec) -> None:
        for name in self._names(adapters):
            self._seen.setdefault(name, set())
            self._started.labels(name).inc()

    def first_output(self, adapters: AdapterSpec, output: FirstOutput) -> None:
        self.totals.first_output(output)
        for name in self._names(adapters):
            self._first.labels(name).observe(output.seconds)
            self._queued.labels(name).observe(output.queue_seconds)

    def next_output(self, tokens: int, seconds: float) -> None:
        self.totals.next_output(tokens, seconds)

    def ended(self, adapters: AdapterSpec, ending: Ending) -> None:
        self.totals.ended(ending)
        for name in self._names(adapters):
            self._seen.setdefault(name, set()).add(ending.reason)
            self._requests.labels(name, ending.reason).inc()
            self._tokens_in.labels(name).inc(ending.prompt_tokens)
            self._tokens_out.labels(name).inc(ending.generated)

    def _names(self, adapters: AdapterSpec) -> list[str]:
        """A request counts under each name that the client used."""
        return [name for name, _ in adapters] or [self._config.model_name]

    def forget(self, adapter: str) -> None:
        """The adapter was unloaded: its labels go."""
        for reason in self._seen.pop(adapter, ()):
            self._requests.remove(adapter, reason)
        for metric in (self._started, self._tokens_in, self._tokens_out, self._first, self._queued):
            with contextlib.suppress(KeyError):
                metric.remove(adapter)

    def resolved(self, event: str) -> None:
        self._resolved.labels(event).inc()

    def render(self) -> bytes:
        """The text format of Prometheus, of what the present caller may see."""
        caller = CALLER.get()
        if not caller.tenant.name:
            return generate_latest(self._registry)
        return generate_latest(TenantView(self._registry, caller))


class _StateCollector(Collector):
    """Turns the engine's `Stats` and the `Totals` into metrics when asked."""

    def __init__(
        self,
        config: Config,
        context_length: int,
        totals: Totals,
        registry: AdapterRegistry,
        engine: EngineLink,
    ):
        self._config = config
        self._context_length = context_length
        self._totals = totals
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
        yield from adapter_metrics(adapters)
