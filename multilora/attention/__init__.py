"""Attention over the paged KV cache: the contract is in `base.py`, the backends by name in `backends.py`."""
