"""The process that compiles grammars: it forks one child for each, which may be killed at any moment.

Run by `grammar_pool.py` as `python -m multilora.drivers.grammar_process SOCKET SECONDS BYTES`; its stdin gives it an
encoded `Setup`. It imports xgrammar and reads the vocabulary once, sends what grammars are bound to (its length, then
the text) on the inherited socket SOCKET, and then forks a child for each connection that comes as a descriptor there.
A child reads one request and answers it. It is killed by the system's timers after SECONDS of computing, or three
times as long on the clock; cannot allocate more than BYTES; and is ended by the signal that says that its client has
closed the connection. It ends with its parent, as their sockets are closed then.
"""

import fcntl
import gc
import os
import resource
import select
import signal
import socket
import sys
import threading
import time

import msgspec

from multilora.drivers.background import stand_aside
from multilora.errors import BadRequest
from multilora.front.grammars.compiler import GrammarCompiler, Setup

PATIENCE = 10
"""A grammar that takes long lets others go first, which are compiled in the same session, by so much more."""
PATIENT_SECONDS = 0.5


class GrammarResult(msgspec.Struct):
    """error: why the grammar is refused; None: `text` is the grammar."""

    text: str = ""
    error: str | None = None


def main(control: socket.socket, seconds: float, nbytes: int) -> None:
    """Serve until the other end of `control` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it may reach us before we leave the group; the server decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    stand_aside()
    compiler = Setup.decode(sys.stdin.buffer.read())
    compiler.compile("regex", "a")  # imports what is left
    info = compiler.tokenizer_info.encode()
    control.sendall(len(info).to_bytes(8) + info)
    gc.collect()
    gc.freeze()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        for descriptor in descriptors:
            if os.fork() == 0:
                control.close()
                _child(compiler, descriptor, seconds, nbytes)
            os.close(descriptor)


def _child(compiler: GrammarCompiler, descriptor: int, seconds: float, nbytes: int) -> None:
    """Answer one request, and end."""
    code = 1
    try:
        with socket.socket(fileno=descriptor) as client:
            _step_back_later()
            _limit(seconds, nbytes)
            chunks = []
            while chunk := client.recv(1 << 16):
                chunks.append(chunk)
            field, source = msgspec.json.decode(b"".join(chunks), type=tuple[str, str])
            _end_with(client)
            answer = _compile(compiler, field, source)
            fcntl.fcntl(client, fcntl.F_SETFL, 0)  # from here on writing raises
            client.sendall(msgspec.json.encode(answer))
            code = 0
    finally:
        os._exit(code)


def _step_back_later() -> None:
    """Have a thread lower this process's priority once the grammar turns out to be no ordinary one."""

    def step_back() -> None:
        time.sleep(PATIENT_SECONDS)
        main = os.getpid()  # on Linux its main thread, which compiles
        os.setpriority(os.PRIO_PROCESS, main, os.getpriority(os.PRIO_PROCESS, main) + PATIENCE)

    threading.Thread(target=step_back, daemon=True).start()


def _limit(seconds: float, nbytes: int) -> None:
    """Time and memory of this process. The alarms' signals kill it even in the middle of native code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the compiler's warnings are not for the log
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 3 * seconds)
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with(client: socket.socket) -> None:
    """Have SIGIO end this process when the client closes the connection."""
    fcntl.fcntl(client, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(client, fcntl.F_SETFL, os.O_ASYNC)
    poller = select.poll()
    poller.register(client, select.POLLHUP)
    if poller.poll(0):  # it has done so already
        os._exit(1)


def _compile(compiler: GrammarCompiler, field: str, source: str) -> GrammarResult:
    try:
        return GrammarResult(text=compiler.compile(field, source))
    except BadRequest as e:
        return GrammarResult(error=e.message)
    except MemoryError:
        os._exit(1)  # as where native code gives up


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3]))
