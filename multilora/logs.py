"""The log of every process of the server: time, level, role (front, engine) and message, one line each.

As text, or as JSON objects, for programs that read logs; those also say which request a line is about.

Called once per process, by `__main__.py`, `engine/process/worker.py` and `engine/ranks/process.py`; never at import.
"""

import contextlib
import json
import logging
import sys
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FORMATS = ("text", "json")
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the HTTP request that this task works for."""
LogLine = tuple[float, str, str]
"""When (seconds since 1970), level, message."""
KEPT_LINES = 500
KEPT_CHARACTERS = 2000
FORMAT = "%(asctime)s %(levelname)-7s {role:<6} %(message)s"


class OneLine(logging.Formatter):
    """Keeps a message on one line whatever a client put into it; only a traceback may follow."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the standard library's name)
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


class JsonLine(logging.Formatter):
    """One JSON object: time, level, role, logger, message; request_id and exception where there is one."""

    def __init__(self, role: str):
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class RecentLines(logging.Handler):
    """Keeps the last `KEPT_LINES` messages, each with a number that grows by one, for whoever asks for those after a
    number. A message is cut at `KEPT_CHARACTERS`."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[dict[str, Any]] = deque(maxlen=KEPT_LINES)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - as logging does: a wrong format string must not end what logs it
            message = str(record.msg)
        self._keep(record.created, record.levelname.lower(), message)

    def _keep(self, time: float, level: str, message: str) -> None:
        self._count += 1
        line = {"number": self._count, "time": time, "level": level, "message": message[:KEPT_CHARACTERS]}
        self._lines.append(line)

    def take(self, role: str, lines: Iterable[LogLine]) -> None:
        """Keep what the process of that role has logged, too."""
        with self.lock or contextlib.nullcontext():
            for time, level, message in lines:
                self._keep(time, level, f"{role}: {message}")

    def after(self, number: int) -> list[dict[str, Any]]:
        """The kept lines whose number is larger, oldest first: number, time (seconds since 1970), level, message."""
        with self.lock or contextlib.nullcontext():
            return [line for line in self._lines if line["number"] > number]


RECENT = RecentLines()
"""The last lines of this process; empty where `setup` was not called for a front process."""


class Handler(logging.StreamHandler[TextIO]):
    """The handler that `setup` makes, of a type of its own so that a second call finds and replaces it."""


def setup(level: str = "info", role: str = "front", form: str = "text") -> None:
    """Log to stderr: this package from `level` on, other libraries from warning on (or `level`, if higher). form: of
    `FORMATS`."""
    own = LEVELS[level]
    handler = Handler(sys.stderr)
    text = OneLine(FORMAT.format(role=role), datefmt="%Y-%m-%d %H:%M:%S")
    handler.setFormatter(JsonLine(role) if form == "json" else text)
    root = logging.getLogger()
    kept = [RECENT] if role.startswith("front") else []
    root.handlers = [h for h in root.handlers if not isinstance(h, Handler | RecentLines)] + [handler, *kept]
    root.setLevel(max(own, logging.WARNING))
    logging.getLogger("multilora").setLevel(own)
    logging.captureWarnings(True)
