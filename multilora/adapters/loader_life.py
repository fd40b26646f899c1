"""One life of the loader process, seen from the engine: its start, what it says on stderr, how it ended.

Owns the process and two pipes; knows no messages. Called by `loader_process.ProcessLoader`.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

END_SECONDS = 1  # for a process that has closed its socket, or is told to end; then it is killed
TAIL_BYTES = 4096  # of stderr
LINE_CHARACTERS = 300
STDERR = 2


class Life:
    """Starts the process. Raises OSError if it cannot be.

    fds: that it inherits. What it writes to stderr goes on to ours, at the latest at the next `listen`.
    """

    def __init__(self, command: Sequence[str], fds: Sequence[int], environment: Mapping[str, str]):
        self.ended = False
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


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "no name"
