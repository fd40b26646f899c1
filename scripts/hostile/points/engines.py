"""Points 7, 8 and 12: how servers and their engines end."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable

import httpx
import psutil

from scripts.hostile.points.adapters import stopped
from scripts.hostile.points.record import LONG, PROMPT, Record, ask, generate, processes, until
from scripts.hostile.target import Target, own_server

ENGINE = "multilora.engine.process"


def engine(target: Target) -> psutil.Process | None:
    for one in psutil.Process(target.pid).children():
        with contextlib.suppress(psutil.Error):
            if any(ENGINE in word for word in one.cmdline()):
                return one
    return None


def stream_end(target: Target) -> str:
    """What the last events of a long stream are."""
    body = {"text": PROMPT, "sampling_params": LONG, "stream": True}
    events = []
    try:
        with httpx.stream("POST", f"http://{target.host}:{target.port}/generate", json=body, timeout=120) as response:
            events = [line for line in response.iter_lines() if line]
    except httpx.HTTPError as error:
        return f"cut ({type(error).__name__})"
    last = events[-2] if len(events) > 1 else ""
    code = json.loads(last.removeprefix("data: ")).get("error", {}).get("code", "whole") if last else "nothing"
    return f"{code}, {events[-1][6:] if events else ''}"


def whole_answer(target: Target) -> str:
    answer = generate(target, LONG)
    return f"{answer.status_code}{', Retry-After' if 'retry-after' in answer.headers else ''}"


def running(target: Target, calls: list[Callable[[Target], str]]) -> tuple[list[str], list[threading.Thread]]:
    """Calls that have begun; their answers are there when the threads have ended."""
    found: list[str] = []
    threads = [threading.Thread(target=lambda c=call: found.append(c(target))) for call in calls]
    for thread in threads:
        thread.start()
    until(lambda: ask(target, "GET", "/load").text == f'{{"server_load":{len(calls)}}}', 20)
    time.sleep(0.5)
    return found, threads


SLOW = ("--max-running-requests", "64")


def _cut_off(target: Target, record: Record, what: str, seconds: float, signals: int = 1) -> None:
    """Stop the server beside 24 long requests, and see how each of them ends."""
    found, threads = running(target, [stream_end] * 12 + [whole_answer] * 12)
    stopped(target, record, f"{what} beside 24 long requests", seconds, signals=signals)
    for thread in threads:
        thread.join()
    record.count("their ends", found, "ServerStopping, [DONE]", "503, Retry-After", "503")


@processes(7, "a second SIGTERM")
def second_signal(record: Record) -> None:
    with own_server(record.log, "--device", "cpu", *record.servers) as target:
        _cut_off(target, record, "two SIGTERM", 8, signals=2)


@processes(8, "the end of the drain")
def drained(record: Record) -> None:
    with own_server(record.log, "--device", "cpu", "--drain-seconds", "1", *record.servers) as target:
        _cut_off(target, record, "SIGTERM with --drain-seconds 1", 12)


@processes(12, "a stopped, a dead and a killed engine")
def lost_engines(record: Record) -> None:
    with own_server(record.log, "--device", "cpu", "--max-engine-restarts", "9", *record.servers) as target:
        for name, number in (("stopped", signal.SIGSTOP), ("killed", signal.SIGKILL)):
            found, threads = running(target, [stream_end] * 3 + [whole_answer] * 3)
            process = engine(target)
            assert process is not None
            process.send_signal(number)
            seen = until(lambda: ask(target, "GET", "/ready").status_code == 503, 15)
            record.note(f"engine {name}: /ready is 503 after", f"{seen and round(seen, 1)} s", seen is not None)
            record.expect("/health meanwhile", ask(target, "GET", "/health").status_code, 200)
            back = until(lambda: ask(target, "GET", "/ready").status_code == 200, 60)
            record.note("/ready is 200 again after", f"{back and round(back, 1)} s", back is not None)
            for thread in threads:
                thread.join()
            record.count("requests that ran", found, "EngineRestarting, [DONE]", "200")
            record.expect("a new one", generate(target).status_code, 200)
    flags = ("--max-engine-restarts", "0", "--engine-heartbeat-timeout", "0")
    with own_server(record.log, "--device", "cpu", *flags, *record.servers) as target:
        process = engine(target)
        assert process is not None
        process.suspend()
        start = time.monotonic()
        status = ask(target, "GET", "/health_generate").status_code
        took = time.monotonic() - start
        record.note(
            "/health_generate of a stopped engine", f"{status} after {took:.0f} s", status == 503 and took < 25
        )
        process.kill()
        dead = until(lambda: ask(target, "GET", "/health").status_code == 503, 10)
        record.note("no restarts: /health is 503 after", f"{dead and round(dead, 1)} s", dead is not None)
        record.expect("/generate then", generate(target).status_code, 503)
