"""Prompts by one `Prefill` until the kernels of another have been built beside the engine.

It owns the thread that builds. What is built, and how, is the caller's: see `flashinfer.py`.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from multilora.attention.paged import KV, Prefill

logger = logging.getLogger(__name__)

LOWEST_PRIORITY = 19
TELLING = re.compile(r"\berror: |not found\b")
"""How compilers and shells begin an error; command lines, which ninja prints too, have no such words."""
MOST_CHARACTERS = 300  # of a reason


class BackgroundBuild:
    """A build on a daemon thread: `ready` is true once it is done. If it fails, a warning says why, once.

    Compilers inherit the thread's low priority, so that they take what steps leave of the cores. The end of the
    process does not wait for them. What they have compiled by then stays for the next start; an engine's own process
    takes them along when its group is killed, in another one they end where they next write to the pipe that is gone.
    """

    def __init__(self, what: str, build: Callable[[], object]):
        """what: the kernels, for the log. build: launches and allocates nothing on a device, for graphs may be
        captured meanwhile."""
        self.ready = False
        self._what, self._build = what, build
        self._thread = threading.Thread(target=self._run, name="build-kernels", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait until it is done or has failed, at most so many seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        logger.info("compiling %s beside the engine, once; prompts go through Triton's until then", self._what)
        started = time.monotonic()
        with contextlib.suppress(OSError):  # then it is as important as the engine
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        try:
            self._build()
        except Exception as e:  # whatever it is, the engine serves without
            logger.warning("%s cannot be compiled, so prompts stay with Triton's: %s", self._what, reason(e))
            logger.debug("compiling %s", self._what, exc_info=True)
            return
        seconds = time.monotonic() - started
        logger.info("%s are compiled (%.0f s); the next prompt goes through them", self._what, seconds)
        self.ready = True


class FallbackPrefill:
    """`fallback` until the kernels of `preferred` are built.

    A step is planned once and run layer by layer, so what changes, changes in `plan`. Ranks change at steps of their
    own: each attends with its own heads, and all get the same sums, whatever kernels those came from.
    """

    def __init__(self, preferred: Prefill, fallback: Prefill, build: BackgroundBuild):
        """preferred: it holds all its memory by now, so that the plan of the device's memory counts it."""
        self._preferred, self._build = preferred, build
        self._active = fallback

    def plan(self, q_lens: Sequence[int], requests: np.ndarray, indices: torch.Tensor) -> None:
        """See `Prefill`."""
        if self._build.ready:
            self._active = self._preferred
        self._active.plan(q_lens, requests, indices)

    def run(self, q: torch.Tensor, kv: KV, out: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> None:
        """See `Prefill`."""
        self._active.run(q, kv, out, layer, sinks)


def reason(error: Exception) -> str:
    """Return one line of what a build has to say: the first that tells of an error, or the first of all."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if TELLING.search(line)), lines[0])[:MOST_CHARACTERS]
