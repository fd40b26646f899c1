"""Waiting for what happens in another process or thread."""

import time
from collections.abc import Callable


def wait_for(happened: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until `happened()` is true. Raises TimeoutError after so many seconds."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"{happened} is not so after {seconds:g} s")
        time.sleep(0.02)
