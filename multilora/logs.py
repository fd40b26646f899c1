"""The log format of every process of the server: time, level, role (front, engine) and message, on one line.

Called once per process, by `__main__.py`, `engine/process/worker.py` and `engine/ranks/process.py`; never at import.
"""

import logging
import sys
from typing import TextIO

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FORMAT = "%(asctime)s %(levelname)-7s {role:<6} %(message)s"


class OneLine(logging.Formatter):
    """Keeps a message on one line whatever a client put into it; only a traceback may follow."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the standard library's name)
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


class _Handler(logging.StreamHandler[TextIO]):
    """The handler that `setup` makes, of a type of its own so that a second call finds and replaces it."""


def setup(level: str = "info", role: str = "front") -> None:
    """Log to stderr: this package from `level` on, other libraries from warning on (or `level`, if higher)."""
    own = LEVELS[level]
    handler = _Handler(sys.stderr)
    handler.setFormatter(OneLine(FORMAT.format(role=role), datefmt="%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h, _Handler)] + [handler]
    root.setLevel(max(own, logging.WARNING))
    logging.getLogger("multilora").setLevel(own)
    logging.captureWarnings(True)
