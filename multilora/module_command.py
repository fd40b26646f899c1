"""The command that runs a module of this package in a process of its own.

`python -m` puts the working directory first among the places that modules come from, so that a `socket.py` in it
would be run as the server's user. A process gets that place only if this one has it: as `python -m multilora` in a
source tree, and not as the installed `multilora` in whatever directory it was started.
"""

import contextlib
import os
import sys


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command `python -m module arguments…` of this interpreter."""
    here = {""}
    with contextlib.suppress(OSError):  # it has been deleted
        here.add(os.getcwd())
    safe = [] if here & set(sys.path) else ["-P"]
    return [sys.executable, *safe, "-m", module, *arguments]
