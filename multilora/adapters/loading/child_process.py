"""One life of the loader process, seen from the engine: its start, what it says on stderr, how it ended, and when the
next one may start.

Owns the process and two pipes; knows no messages. Called by `process.py`.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from time import monotonic

END_SECONDS = 1  # for a process that has closed its socket, or is told to end; then it is killed
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
TAIL_BYTES = 4096  # of stderr
LINE_CHARACTERS = 300
STDERR = 2


class ChildProcess:
    """Starts the process. Raises OSError if it cannot be.

    fds: that it inherits. What it writes to stderr goes on to ours, at the latest at the next `listen`.
    """

    def __init__(self, command: Sequence[str], fds: Sequence[int], environment: Mapping[str, str]):
        self.ended = False
        self.answered = False  # set by who hears it
        self._tail = b""
        # Nobody writes to this pipe or knows that it is there: that it ends says that all who have it are gone, the
        # process and whatever it forked. The system takes a process' memory away before it closes its files.
        self._held, held = os.pipe()
        try:
            self.process = subprocess.Popen(
                command,
                bufsize=0,
                pass_fds=(*fds, held),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
            )
        except OSError:
            os.close(self._held)
            raise
        finally:
            os.close(held)
        assert self.process.stderr is not None
        self._stderr = self.process.stderr
        for fd in (self._held, self._stderr.fileno()):
            os.set_blocking(fd, False)

    def listen(self) -> None:
        """Hand on what has been written to stderr. Does not wait."""
        while not self._stderr.closed and (data := self._stderr.read(1 << 16)):
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            with contextlib.suppress(OSError):  # ours is closed
                os.write(STDERR, data)

    def end(self) -> None:
        """The process has closed its end of the socket, or soon will. Waits for it, not for what it has forked."""
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # in the middle of a download
            self.process.kill()
            self.process.wait()
        self.ended = True
        self.listen()

    def gone(self) -> bool:
        """Neither the process nor anything that it has forked is left. Does not wait."""
        self.listen()
        try:
            return not os.read(self._held, 1)
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Nothing is heard from it any more."""
        if not self._stderr.closed:
            self.listen()
            self._stderr.close()
            os.close(self._held)

    def how(self) -> str:
        """Once it has ended: "ended with exit code 1: ImportError: …"."""
        code = self.process.returncode
        text = f"exit code {code}" if code >= 0 else f"signal {-code} ({_signal_name(-code)})"
        lines = self._tail.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"ended with {text}" + (f": {last[:LINE_CHARACTERS]}" if last else "")


class Starts:
    """When the next process may start. At once after one that was of use, as it had answered something, and after the
    first that was not; each further one in a row makes the pause twice as long, up to LONGEST_PAUSE_SECONDS."""

    def __init__(self) -> None:
        self._failed = 0  # in a row
        self._pause = 0.0
        self._next_at = 0.0
        self._how = ""

    def ended(self, how: str, useful: bool) -> float:
        """A process has ended, or could not be started. Returns the pause in seconds."""
        self._failed = 0 if useful else self._failed + 1
        if self._failed < 2:
            self._pause = 0.0
        else:
            self._pause = min(2 * self._pause or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._next_at = monotonic() + self._pause
        self._how = how
        return self._pause

    @property
    def seconds_left(self) -> float:
        """Of the pause."""
        return max(0.0, self._next_at - monotonic())

    def trouble(self) -> str:
        """What to tell somebody whose adapter cannot be loaded because of that."""
        if self._failed < 2:
            return f"the loader process {self._how}; try again"
        return (
            f"the loader process cannot be started: {self._failed} times in a row it {self._how}; see what it wrote "
            "to the engine's stderr and, if a signal ended it, the memory limit of the machine or container; next "
            f"try in {self.seconds_left:.0f} s"
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "no name"
