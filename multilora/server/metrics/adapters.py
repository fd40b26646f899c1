"""Metrics with an adapter's name as label: what routers read (vLLM's names), and the engine's numbers for each.

Which adapters have a label of their own is said by `top_names.py`; the others are summed up as `other`. An adapter
that is gone leaves no label behind.
"""

import time
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from multilora.engine.messages import AdapterStats, Stats
from multilora.server.metrics.top_names import OTHER, TopNames
from multilora.server.metrics.usage import Usage

PER_ADAPTER = ["adapter_name"]
Named = list[tuple[str, AdapterStats]]
"""Loaded versions with the name of each. While an adapter is replaced, two versions share one."""


def routing_metrics(stats: Stats, adapters: Named, max_lora: int | None) -> Iterator[Metric]:
    """What Kubernetes' Gateway API inference extension routes by. `max_lora`: the limit, None without one."""
    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters of running and waiting requests; the value is the time of the update",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    running = ",".join(sorted({name for name, a in adapters if a.running}))
    waiting = ",".join(sorted({name for name, a in adapters if a.waiting}))
    info.add_metric([str(stats.slots_total if max_lora is None else max_lora), running, waiting], time.time())
    yield info


_COUNTERS = {
    "loads": "Copies from host to device",
    "evictions": "Evictions from the device",
    "fetches": "Fetches from disk or hub to host",
    "hits": "Requests that found the adapter resident",
    "misses": "Requests that had to wait for it",
    "load_seconds": "Seconds spent on copies from host to device",
}
_NO_COUNTS = dict.fromkeys(_COUNTERS, 0.0)


class AdapterCounts:
    """The engine's counters of adapters, added up by name: a version that is replaced takes nothing away."""

    def __init__(self, names: TopNames[Usage]):
        self._names = names
        self._seen: dict[int, dict[str, float]] = {}  # by version, what is counted already

    def update(self, adapters: Named) -> None:
        """Count what is new since the last update. O(adapters)."""
        seen = {}
        for name, a in adapters:
            now = seen[a.version] = {attribute: getattr(a, attribute) for attribute in _COUNTERS}
            before = self._seen.get(a.version, _NO_COUNTS)
            if any(now[attribute] < before[attribute] for attribute in _COUNTERS):
                before = _NO_COUNTS  # another engine, which began at 0
            engine = self._names.admit(name).engine
            for attribute in _COUNTERS:
                engine[attribute] += now[attribute] - before[attribute]
        self._seen = seen


def adapter_metrics(adapters: Named, names: TopNames[Usage]) -> Iterator[Metric]:
    """What `AdapterCounts` has counted, and where the adapters are now."""
    for attribute, text in _COUNTERS.items():
        counter = CounterMetricFamily(f"multilora:adapter_{attribute}", text, labels=PER_ADAPTER)
        for name, usage in names.items():
            if usage.engine:
                counter.add_metric([name], usage.engine[attribute])
        yield counter
    labelled: dict[str, list[AdapterStats]] = {}
    for name, a in adapters:
        labelled.setdefault(name if name in names else OTHER, []).append(a)
    yield _loaded(labelled)
    for attribute, text in {"running": "Running requests", "waiting": "Waiting requests"}.items():
        gauge = GaugeMetricFamily(f"multilora:adapter_requests_{attribute}", text, labels=PER_ADAPTER)
        for name, versions in labelled.items():
            gauge.add_metric([name], sum(getattr(a, attribute) for a in versions))
        yield gauge
    size = GaugeMetricFamily("multilora:adapter_bytes", "Bytes by tier", labels=["adapter_name", "tier"])
    for tier in ("host", "device"):
        for name, versions in labelled.items():
            size.add_metric([name, tier], sum(getattr(a, f"{tier}_bytes") for a in versions))
    yield size


def _loaded(labelled: dict[str, list[AdapterStats]]) -> Metric:
    """1 for each adapter with a label of its own; `other` has numbers of adapters."""
    labels = ["adapter_name", "level", "pinned", "rank"]
    gauge = GaugeMetricFamily("vllm:lora_adapter_loaded", "Adapters known to the server", labels=labels)
    for name, versions in labelled.items():
        kinds = Counter((a.level, str(a.pinned).lower(), str(a.rank)) for a in versions)
        for kind, number in kinds.items():
            gauge.add_metric([name, *kind], number if name == OTHER else 1)
    return gauge
