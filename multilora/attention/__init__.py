"""Attention over the paged KV cache. Backends by name; `base.py` is the contract."""
