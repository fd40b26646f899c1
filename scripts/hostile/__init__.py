"""Hostile requests against a running server. See `__main__.py`."""
