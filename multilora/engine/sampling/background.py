"""Daemon threads for native code that releases the GIL, such as the compiler of grammars: never waited for at the end
of the process, unlike those of `concurrent.futures`."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Background:
    """At most `threads` of them, started when there is work."""

    def __init__(self, threads: int, name: str):
        self._limit = threads
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._started = 0

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Call `work` on one of the threads, first come first served."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as e:  # noqa: BLE001 - the future carries it to the caller
                future.set_exception(e)

        self._work.put(run)
        if self._started < self._limit:
            self._started += 1
            threading.Thread(target=self._serve, name=f"{self._name}-{self._started}", daemon=True).start()
        return future

    def _serve(self) -> None:
        while True:
            self._work.get()()
