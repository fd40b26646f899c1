"""One child process, seen from its parent: its start, its stderr, how it ended, and when the next one may start.

It owns the process and two pipes, and knows nothing of the messages that the two exchange. Called by `process.py`.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from time import monotonic

END_SECONDS = 1  # until a process that has closed its socket, or is told to end, is killed
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
TAIL_BYTES = 4096  # of stderr
LINE_CHARACTERS = 300
STDERR = 2


class ChildProcess:
    """A running process. Raises OSError if it cannot be started.

    fds: descriptors that it inherits. `listen` passes what it writes to stderr on to this process' stderr.
    """

    def __init__(self, command: Sequence[str], fds: Sequence[int], environment: Mapping[str, str]):
        self.ended = False
        self.answered = False  # whether it has been of use; its owner sets it
        self._tail = b""
        # Nobody writes to this pipe. Its end of file says that all holders of the other end are gone: the process and
        # whatever it forked. The system frees a process' memory before it closes its files.
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
        """Pass on what has been written to stderr, without waiting for more."""
        while not self._stderr.closed and (data := self._stderr.read(1 << 16)):
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            with contextlib.suppress(OSError):  # ours is closed
                os.write(STDERR, data)

    def end(self) -> None:
        """Wait for the process, which has closed its socket or soon will; kill it, not its forks, after
        END_SECONDS."""
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # in the middle of a download
            self.process.kill()
            self.process.wait()
        self.ended = True
        self.listen()

    def gone(self) -> bool:
        """Whether the process and everything that it has forked are gone. Does not wait."""
        self.listen()
        try:
            return not os.read(self._held, 1)
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Close the pipes: nothing more is heard from the process."""
        if not self._stderr.closed:
            self.listen()
            self._stderr.close()
            os.close(self._held)

    def describe_end(self) -> str:
        """How the process ended: "ended with exit code 1: ImportError: …"."""
        code = self.process.returncode
        text = f"exit code {code}" if code >= 0 else f"signal {-code} ({_signal_name(-code)})"
        lines = self._tail.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"ended with {text}" + (f": {last[:LINE_CHARACTERS]}" if last else "")


class RestartPolicy:
    """When the next process may start: at once after one that had answered something, and after the first that had
    not; each further failure in a row doubles the pause, up to LONGEST_PAUSE_SECONDS."""

    def __init__(self) -> None:
        self._failed = 0  # in a row
        self._pause = 0.0
        self._next_at = 0.0
        self._how = ""

    def ended(self, how: str, useful: bool) -> float:
        """Note that a process has ended, or could not be started (how: says which). Returns the pause in seconds."""
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
        """Seconds left of the pause."""
        return max(0.0, self._next_at - monotonic())

    def explanation(self) -> str:
        """The error message for an adapter that cannot be loaded because of that."""
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
