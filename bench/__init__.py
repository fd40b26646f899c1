"""Benchmarks: each prints its hardware, commit and workload, and ends with one line of JSON."""
