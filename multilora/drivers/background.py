"""A process beside the server's that steps back for it."""

import contextlib
import os

NICENESS = 5
"""Running requests come first: the whole session has this weight beside the front's and the engine's."""


def stand_aside() -> None:
    """Take a session of its own: Linux shares out cores among sessions first (autogroup), and in the front's session
    what this process takes would count as the front's."""
    os.setsid()
    os.nice(NICENESS)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w", encoding="ascii") as file:
        file.write(str(NICENESS))
