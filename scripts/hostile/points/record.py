"""What one point found, and the table of points."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from scripts.hostile.target import Target

PROMPT = "Q: What is the capital of France?\nA:"
LONG: dict[str, object] = {"max_new_tokens": 1900, "ignore_eos": True, "temperature": 0}

T = TypeVar("T")


@dataclass
class Record:
    """What was sent and what came back, one line each. servers: flags that every server of this point is given;
    log: where servers write."""

    servers: tuple[str, ...] = ()
    log: str = ""
    lines: list[tuple[bool, str, str]] = field(default_factory=list)

    def note(self, sent: str, got: object, good: bool) -> None:
        self.lines.append((good, sent, str(got)))

    def expect(self, sent: str, got: object, *wanted: object) -> None:
        """Note it; good is one of the wanted."""
        self.note(sent, got, got in wanted)

    def count(self, sent: str, got: Iterable[object], *wanted: object) -> None:
        """Note many answers at once; good is when each is one of the wanted."""
        found = Counter(got)
        self.note(sent, ", ".join(f"{n} × {one}" for one, n in found.items()), set(found) <= set(wanted))

    @property
    def good(self) -> bool:
        return bool(self.lines) and all(good for good, _, _ in self.lines)


@dataclass(frozen=True)
class Point:
    """work: on the target that has these flags, or, with none, whatever servers it starts itself."""

    number: int
    name: str
    work: Callable[[Target, Record], None] | None
    alone: Callable[[Record], None] | None
    flags: tuple[str, ...] = ()


POINTS: list[Point] = []


PLAIN = ("--enable-lora",)
TIGHT = (
    *PLAIN,
    *("--max-logprobs", "1024", "--lora-host-bytes", "1000"),
    *("--max-running-requests", "6", "--max-queued-requests", "4"),
)


def requests(number: int, name: str, flags: tuple[str, ...] = PLAIN) -> Callable[[T], T]:
    """A point that sends requests to a server with these flags."""

    def add(work: T) -> T:
        POINTS.append(Point(number, name, work, None, flags))  # type: ignore[arg-type]
        return work

    return add


def processes(number: int, name: str) -> Callable[[T], T]:
    """A point that starts servers of its own, and signals them."""

    def add(work: T) -> T:
        POINTS.append(Point(number, name, None, work))  # type: ignore[arg-type]
        return work

    return add


def ask(
    target: Target, method: str, path: str, body: object = None, key: str | None = None, timeout: float = 240
) -> httpx.Response:
    """One request on a connection of its own; what ended without an answer has status 0 and the reason."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = f"http://{target.host}:{target.port}{path}"
    try:
        return httpx.request(method, url, json=body, headers=headers, timeout=timeout)
    except httpx.HTTPError as error:
        return httpx.Response(0, text=type(error).__name__)


def generate(target: Target, sampling: dict[str, object] | None = None, **fields: object) -> httpx.Response:
    body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 8, "temperature": 0} | (sampling or {})} | fields
    return ask(target, "POST", "/generate", body)


def said(response: httpx.Response, *words: str) -> str:
    """The status, and whether the answer has these words."""
    missing = [word for word in words if word not in response.text]
    return f"{response.status_code}" + (f" without {', '.join(missing)}: {response.text[:120]}" if missing else "")


def until(condition: Callable[[], bool], seconds: float) -> float | None:
    """How long it took to become true, or None."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if condition():
            return time.monotonic() - start
        time.sleep(0.05)
    return None


def idle(target: Target, record: Record, seconds: float = 20) -> None:
    """Note that no request is left."""
    took = until(lambda: ask(target, "GET", "/load").text == '{"server_load":0}', seconds)
    left = ask(target, "GET", "/load").text if took is None else "0"
    record.expect("then /load", left, "0")


def head(path: str, body: bytes, *headers: str) -> bytes:
    """A POST as bytes, for sockets."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chosen(numbers: Sequence[int]) -> list[Point]:
    return sorted((p for p in POINTS if not numbers or p.number in numbers), key=lambda p: p.number)
