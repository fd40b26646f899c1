"""How long an engine's OpenMP threads spin before they sleep.

An engine shares its cores with the front, the loader and the processes that compile grammars. GNU's OpenMP lets a
thread that waits for the others spin for about 20 ms. If one of them has lost its core to another process, all wait
on theirs until the kernel gives it back after a time slice, and a step of 6 ms takes 70 to 140. `client.py` starts
engines with this environment; ranks inherit it.
"""

import os

SPINS = 1000
"""About 50 µs: longer than from one product of a step to the next, shorter than a time slice."""

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def environment() -> dict[str, str]:
    """This process' environment with `SPINS`; what somebody has set stays as it is."""
    if any(name in os.environ for name in SETTINGS):
        return dict(os.environ)
    return {**os.environ, "GOMP_SPINCOUNT": str(SPINS)}
