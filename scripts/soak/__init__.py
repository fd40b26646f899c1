"""A soak of a real server: load, faults, and what must hold all along and afterwards. See `__main__.py`."""
