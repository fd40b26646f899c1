"""The 22 points at which a running server was once broken, tried again. See `__main__.py`."""
