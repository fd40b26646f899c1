"""The engine's heartbeat: how the front notices that its process is stopped, or that a step hangs.

    engine: thread ── every PULSE_SECONDS, the number of rounds that the step loop has begun ──► pipe ──► front

A process that is stopped, or whose interpreter lock is held for ever, sends nothing. A step that hangs while the
thread lives sends the same number again and again.
"""

import contextlib
import os
import struct
import threading
from collections.abc import Callable
from time import monotonic

PULSE_SECONDS = 0.5
LATE_SECONDS = 2.0
"""A check that comes so much later than the one before says that this process was stopped itself."""
_PULSE = struct.Struct("<Q")


class Pulse:
    """The engine's end. `rounds` belongs to the step loop, which raises it by one in each round.

    each: is called by the thread between two pulses.
    """

    def __init__(self, fd: int, each: Callable[[], None] = lambda: None):
        self.rounds = 0
        self._fd = fd
        self._each = each
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        os.set_blocking(fd, False)

    def start(self) -> None:
        """Send a first pulse and go on until `stop`."""
        self._send()
        self._thread.start()

    def stop(self) -> None:
        """No pulse follows."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(PULSE_SECONDS):
            self._send()
            self._each()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # nobody reads any more, or the pipe is full of pulses
            os.write(self._fd, _PULSE.pack(self.rounds))


class PulseMonitor:
    """The front's end, to be asked every PULSE_SECONDS. Owns the descriptor.

    heartbeat: the longest silence; 0: any. step: the longest time for one round. Both in seconds.
    """

    def __init__(self, fd: int, heartbeat: float, step: float, clock: Callable[[], float] = monotonic):
        self._fd = fd
        self._heartbeat = heartbeat
        self._step = step
        self._clock = clock
        self._checked_at = self._heard_at = self._moved_at = clock()
        self._rounds = -1
        os.set_blocking(fd, False)

    def check(self) -> str | None:
        """What is wrong with the engine; None: nothing. It counts from the first call."""
        now = self._clock()
        if self._rounds < 0 or now - self._checked_at > LATE_SECONDS:
            self._heard_at = self._moved_at = now
            self._rounds = max(self._rounds, 0)
        self._checked_at = now
        self._read(now)
        if self._heartbeat and now - self._heard_at > self._heartbeat:
            return f"it has given no sign of life for {self._heartbeat:g} s (--engine-heartbeat-timeout)"
        if now - self._moved_at > self._step:
            return f"a step has not ended within {self._step:g} s (--watchdog-timeout)"
        return None

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, now: float) -> None:
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return
        if len(data) < _PULSE.size:
            return
        self._heard_at = now
        (rounds,) = _PULSE.unpack_from(data, len(data) // _PULSE.size * _PULSE.size - _PULSE.size)
        if rounds != self._rounds:
            self._rounds, self._moved_at = rounds, now
