"""Ranks as threads of the test's process: everything that real ones do, without the seconds that a process takes to
start. Used by `engine_driver.py`."""

import subprocess
import threading

import zmq

from multilora.engine.ranks.follow import follow


class RankThread:
    """The contract of `RankProcess`. A thread cannot be killed: it ends when it is told to, or with its process."""

    def __init__(self, directory: str, rank: int):
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._well = True
        self._thread = threading.Thread(target=self._run, args=(directory, rank), daemon=True)
        self._thread.start()

    def _run(self, directory: str, rank: int) -> None:
        self._well = follow(self._context, directory, rank)
        self._context.term()

    def poll(self) -> int | None:
        return None if self._thread.is_alive() else int(not self._well)

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return int(not self._well)


def start_thread(directory: str, rank: int) -> RankThread:
    """A `StartRank`."""
    return RankThread(directory, rank)
