"""Prometheus metrics at /metrics: what the front counts itself, and the engine's latest `Stats` when asked.

Names that other tools read keep the prefix of the peer they come from (`sglang:`, `vllm:`); ours is `multilora:`.
Label `adapter_name` is the adapter's name, the base model's name for requests without one; a composition counts for
each of its adapters, what the front counts of a named one for that name. An adapter that is gone leaves no label
behind. Each `Metrics` has its own CollectorRegistry, so that several servers fit one process.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from multilora.engine.messages import AdapterStats, Stats
from multilora.front.adapter_spec import AdapterSpec
from multilora.front.observer import Observer
from multilora.front.registry import AdapterRegistry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_ADAPTER = ["adapter_name"]


class Metrics(Observer):
    """`model_name`: the base model's. `max_lora`: for vLLM's label of that name; None: no limit."""

    def __init__(self, model_name: str, max_lora: int | None):
        self._base = model_name
        self._max_lora = max_lora
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "multilora:requests", "Requests ended", [*_PER_ADAPTER, "finish_reason"], registry=self._registry
        )
        self._started = self._counter("requests_started", "Requests submitted to the engine")
        self._tokens_in = self._counter("prompt_tokens", "Prompt tokens of ended requests")
        self._tokens_out = self._counter("generation_tokens", "Generated tokens of ended requests")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first output")
        self._queued = self._histogram("queue_time_seconds", "From submission to the first step")
        self._seen: dict[str, set[str]] = {}  # adapter → finish reasons

    def watch(self, names: AdapterRegistry, stats: Callable[[], Stats]) -> None:
        """Show what the engine says too. `stats`: returns its latest snapshot."""
        self._registry.register(_EngineCollector(names, stats, self._max_lora))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"multilora:{name}", text, _PER_ADAPTER, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"multilora:{name}", text, _PER_ADAPTER, registry=self._registry, buckets=_SECONDS)

    def submitted(self, adapters: AdapterSpec) -> None:
        for name in self._names(adapters):
            self._seen.setdefault(name, set())
            self._started.labels(name).inc()

    def first_output(self, adapters: AdapterSpec, seconds: float, queue_seconds: float) -> None:
        for name in self._names(adapters):
            self._first.labels(name).observe(seconds)
            self._queued.labels(name).observe(queue_seconds)

    def ended(self, adapters: AdapterSpec, prompt_tokens: int, generated: int, reason: str) -> None:
        for name in self._names(adapters):
            self._seen.setdefault(name, set()).add(reason)
            self._requests.labels(name, reason).inc()
            self._tokens_in.labels(name).inc(prompt_tokens)
            self._tokens_out.labels(name).inc(generated)

    def _names(self, adapters: AdapterSpec) -> list[str]:
        """A request counts under each name that the client used."""
        return [name for name, _ in adapters] or [self._base]

    def forget(self, adapter: str) -> None:
        """The adapter was unloaded: its labels go."""
        for reason in self._seen.pop(adapter, ()):
            self._requests.remove(adapter, reason)
        for metric in (self._started, self._tokens_in, self._tokens_out, self._first, self._queued):
            with contextlib.suppress(KeyError):
                metric.remove(adapter)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Turns the engine's `Stats` into metrics when asked."""

    def __init__(self, registry: AdapterRegistry, stats: Callable[[], Stats], max_lora: int | None):
        self._names = registry
        self._stats = stats
        self._max_lora = max_lora

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        adapters = [(name, a) for a in stats.adapters if (name := self._names.name_of(a.version)) is not None]
        yield from _engine(stats)
        yield from self._routing(stats, adapters)
        yield from _adapters(adapters)

    def _routing(self, stats: Stats, adapters: list[tuple[str, AdapterStats]]) -> Iterator[Metric]:
        """What Kubernetes' Gateway API inference extension routes by."""
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time of the update",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running = ",".join(sorted({name for name, a in adapters if a.running}))
        waiting = ",".join(sorted({name for name, a in adapters if a.waiting}))
        max_lora = self._max_lora if self._max_lora is not None else stats.slots_total
        info.add_metric([str(max_lora), running, waiting], time.time())
        yield info
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for each adapter known to the server",
            labels=["adapter_name", "level", "pinned", "rank"],
        )
        seen = set()
        for name, a in adapters:
            labels = (name, a.level, str(a.pinned).lower(), str(a.rank))
            if labels not in seen:
                loaded.add_metric(labels, 1)
            seen.add(labels)
        yield loaded


def _engine(stats: Stats) -> Iterator[Metric]:
    in_use = stats.total_pages - stats.free_pages - stats.prefix_pages
    gauges = [
        ("sglang:lora_pool_slots_used", "Adapters resident on the device", stats.slots_used),
        ("sglang:lora_pool_slots_total", "Adapters that can be resident at once", stats.slots_total),
        (
            "sglang:lora_pool_utilization",
            "slots_used / slots_total",
            stats.slots_used / stats.slots_total if stats.slots_total else 0.0,
        ),
        ("vllm:num_requests_running", "Requests in the running batch", stats.running),
        ("vllm:num_requests_waiting", "Requests waiting to run", stats.waiting),
        (
            "vllm:kv_cache_usage_perc",
            "Part of the arena's pages that running requests and adapters hold, 0 to 1",
            in_use / stats.total_pages if stats.total_pages else 0.0,
        ),
        ("multilora:paused", "1 while generation is paused, asleep or not", float(stats.pause.mode is not None)),
        ("multilora:sleeping", "1 while the engine is asleep", float(stats.pause.sleeping)),
        ("multilora:page_bytes", "Bytes of one page of the arena", stats.page_bytes),
    ]
    for name, text, value in gauges:
        yield GaugeMetricFamily(name, text, value=value)
    pages = GaugeMetricFamily("multilora:pages", "Pages of the arena by use", labels=["use"])
    for use in ("free", "kv", "prefix", "adapter"):
        pages.add_metric([use], getattr(stats, f"{use}_pages"))
    yield pages
    counters = [
        ("engine_prompt_tokens", "Prompt tokens computed", stats.prompt_tokens),
        ("engine_cached_tokens", "Prompt tokens taken from the prefix cache", stats.cached_tokens),
        ("engine_generated_tokens", "Tokens sampled", stats.generated_tokens),
        ("preemptions", "Requests sent back to the queue to free memory", stats.preemptions),
        ("steps", "Steps of the engine", stats.steps),
    ]
    for name, text, value in counters:
        yield CounterMetricFamily(f"multilora:{name}", text, value=value)


_ADAPTER_COUNTERS = {
    "loads": "Copies from host to device",
    "evictions": "Evictions from the device",
    "fetches": "Fetches from disk or hub to host",
    "hits": "Requests that found the adapter resident",
    "misses": "Requests that had to wait for it",
    "load_seconds": "Seconds spent on copies from host to device",
}


def _adapters(adapters: list[tuple[str, AdapterStats]]) -> Iterator[Metric]:
    """Summed by name: while an adapter is replaced, two versions share it."""
    by_name: dict[str, list[AdapterStats]] = {}
    for name, adapter in adapters:
        by_name.setdefault(name, []).append(adapter)

    def fill(metric: CounterMetricFamily | GaugeMetricFamily, attribute: str, *labels: str) -> None:
        for name, versions in by_name.items():
            metric.add_metric([name, *labels], sum(getattr(v, attribute) for v in versions))

    for attribute, text in _ADAPTER_COUNTERS.items():
        counter = CounterMetricFamily(f"multilora:adapter_{attribute}", text, labels=_PER_ADAPTER)
        fill(counter, attribute)
        yield counter
    for attribute, text in {"running": "Running requests", "waiting": "Waiting requests"}.items():
        gauge = GaugeMetricFamily(f"multilora:adapter_requests_{attribute}", text, labels=_PER_ADAPTER)
        fill(gauge, attribute)
        yield gauge
    size = GaugeMetricFamily("multilora:adapter_bytes", "Bytes by tier", labels=["adapter_name", "tier"])
    fill(size, "host_bytes", "host")
    fill(size, "device_bytes", "device")
    yield size
