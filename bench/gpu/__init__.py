"""The GPU benchmark, `python -m bench.gpu`: see `__main__.py`."""
