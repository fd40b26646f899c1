"""One histogram read with the buckets of several metrics.

Covers `metrics/histogram.py`, `metrics/buckets.py` too.
"""

import random
from bisect import bisect_right

from prometheus_client.core import HistogramMetricFamily

from multilora.server.metrics.buckets import token_buckets
from multilora.server.metrics.histogram import Histogram


def read(histogram, bounds):
    family = HistogramMetricFamily("h", "text", labels=["l"])
    histogram.add_to(family, ["x"], bounds)
    return {(s.name, s.labels.get("le")): s.value for s in family.samples}


def test_buckets_are_cumulative_and_include_their_boundary():
    fine, coarse = (0.1, 0.2, 1, 5), (0.2, 3)
    values = [random.Random(7).choice((0.05, 0.1, 0.15, 0.2, 0.7, 1, 2, 3, 4, 5, 6)) for _ in range(300)]
    histogram = Histogram(fine, coarse)
    for value in values:
        histogram.observe(value)
    values.sort()
    for bounds in (fine, coarse):
        found = read(histogram, bounds)
        for bound in bounds:
            assert found["h_bucket", str(float(bound))] == bisect_right(values, bound)
        assert found["h_bucket", "+Inf"] == found["h_count", None] == len(values) == histogram.count
        assert abs(found["h_sum", None] - sum(values)) < 1e-9


def test_several_at_once():
    histogram = Histogram((1, 2))
    histogram.observe(1.5, 4)
    assert read(histogram, (1, 2)) == {
        ("h_bucket", "1.0"): 0,
        ("h_bucket", "2.0"): 4,
        ("h_bucket", "+Inf"): 4,
        ("h_count", None): 4,
        ("h_sum", None): 6.0,
    }


def test_one_adds_what_another_has_counted():
    both, one = Histogram((1, 2)), Histogram((1, 2))
    for value in (0.5, 1.5, 9):
        both.observe(value)
        one.observe(value, 2)
    both.add(one.counts, one.sum)
    assert both.counts == [3, 3, 3] and both.sum == 33.0


def test_buckets_of_tokens_end_at_the_context():
    assert token_buckets(128) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(1000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
