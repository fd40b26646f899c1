"""Prometheus metrics: what the front counts itself, the engine's `Stats`, and the names that peers' tools read.

`collector.py` is the door; `totals.py` counts everything, `usage.py` by adapter and by tenant, for as many names as
`top_names.py` allows; `vllm.py`, `sglang.py`, `own.py` and `adapters.py` name, each one family of names; `http.py`
counts requests by route. Nothing here runs in the engine's process.
"""
