"""Metrics with an adapter's name as label: what routers read (vLLM's names), and the engine's numbers for each.

An adapter that is gone leaves no label behind; there are as many labels as loaded adapters.
"""

import time
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from multilora.engine.messages import AdapterStats, Stats

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


_ADAPTER_COUNTERS = {
    "loads": "Copies from host to device",
    "evictions": "Evictions from the device",
    "fetches": "Fetches from disk or hub to host",
    "hits": "Requests that found the adapter resident",
    "misses": "Requests that had to wait for it",
    "load_seconds": "Seconds spent on copies from host to device",
}


def adapter_metrics(adapters: Named) -> Iterator[Metric]:
    """Summed by name: while an adapter is replaced, two versions share it."""
    by_name: dict[str, list[AdapterStats]] = {}
    for name, adapter in adapters:
        by_name.setdefault(name, []).append(adapter)

    def fill(metric: CounterMetricFamily | GaugeMetricFamily, attribute: str, *labels: str) -> None:
        for name, versions in by_name.items():
            metric.add_metric([name, *labels], sum(getattr(v, attribute) for v in versions))

    for attribute, text in _ADAPTER_COUNTERS.items():
        counter = CounterMetricFamily(f"multilora:adapter_{attribute}", text, labels=PER_ADAPTER)
        fill(counter, attribute)
        yield counter
    for attribute, text in {"running": "Running requests", "waiting": "Waiting requests"}.items():
        gauge = GaugeMetricFamily(f"multilora:adapter_requests_{attribute}", text, labels=PER_ADAPTER)
        fill(gauge, attribute)
        yield gauge
    size = GaugeMetricFamily("multilora:adapter_bytes", "Bytes by tier", labels=["adapter_name", "tier"])
    fill(size, "host_bytes", "host")
    fill(size, "device_bytes", "device")
    yield size
