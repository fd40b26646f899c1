"""Prometheus metrics: what the front counts itself, the engine's `Stats`, and the names that peers' tools read.

`collector.py` is the door; `totals.py` counts, `vllm.py`, `sglang.py`, `own.py` and `adapters.py` name, each one
family of names; `http.py` counts requests by route. Nothing here runs in the engine's process.
"""
