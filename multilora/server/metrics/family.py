"""Short forms for the metrics of one peer, whose samples all carry the same labels."""

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from multilora.server.metrics.histogram import Histogram


class Labelled:
    """Makes metrics whose names begin with `prefix` and whose samples carry `labels`."""

    def __init__(self, prefix: str, labels: Mapping[str, str]):
        self._prefix = prefix
        self._names = list(labels)
        self._values = list(labels.values())

    def gauge(self, name: str, text: str, value: float, **labels: str) -> GaugeMetricFamily:
        """A gauge of one sample."""
        family = GaugeMetricFamily(self._prefix + name, text, labels=[*self._names, *labels])
        family.add_metric([*self._values, *labels.values()], value)
        return family

    def gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
        """A gauge with a sample for each value of `label`."""
        family = GaugeMetricFamily(self._prefix + name, text, labels=[*self._names, label])
        for key, value in values.items():
            family.add_metric([*self._values, key], value)
        return family

    def counter(self, name: str, text: str, value: float, **labels: str) -> CounterMetricFamily:
        """A counter of one sample; `name` without `_total`."""
        family = CounterMetricFamily(self._prefix + name, text, labels=[*self._names, *labels])
        family.add_metric([*self._values, *labels.values()], value)
        return family

    def counters(self, name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
        """A counter with a sample for each value of `label`."""
        family = CounterMetricFamily(self._prefix + name, text, labels=[*self._names, label])
        for key, value in values.items():
            family.add_metric([*self._values, key], value)
        return family

    def histogram(self, name: str, text: str, source: Histogram, bounds: Iterable[float]) -> HistogramMetricFamily:
        """`source` with these buckets."""
        family = HistogramMetricFamily(self._prefix + name, text, labels=self._names)
        source.add_to(family, self._values, bounds)
        return family
