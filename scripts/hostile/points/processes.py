"""Points 9, 13 and 22: ports, descriptors and folders of the server's process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from scripts.hostile.points.adapters import PATHS, from_tensors
from scripts.hostile.points.record import Record, ask, generate, processes, requests, until
from scripts.hostile.target import Target, free_port, own_server


@requests(9, "120 idle connections, a soft limit of 64")
def soft_limit(target: Target, record: Record) -> None:
    """The server was started with that limit, and has raised it."""
    _idle_connections(target, record, {200})


@processes(9, "120 idle connections, a hard limit of 64")
def hard_limit(record: Record) -> None:
    command = ("bash", "-c", 'ulimit -n 64; exec "$0" "$@"')
    with tempfile.NamedTemporaryFile() as log:
        try:
            with own_server(log.name, "--device", "cpu", *record.servers, prefix=command) as target:
                _idle_connections(target, record, {200, 503}, Path(log.name))
        except SystemExit:
            said = Path(log.name).read_text().strip()
            record.note("the start", said[-150:], "Traceback" not in said)


def _idle_connections(target: Target, record: Record, wanted: set[int], log: Path | None = None) -> None:
    before = log.stat().st_size if log else 0
    with contextlib.ExitStack() as stack:
        for _ in range(120):
            with contextlib.suppress(OSError):
                stack.enter_context(target.socket())
        start = time.monotonic()
        answers = [ask(target, "GET", "/health", timeout=10).status_code for _ in range(20)]
        record.note("20 × /health beside them", sorted(set(answers)), set(answers) <= wanted)
        if log:
            time.sleep(max(0.0, 10 - (time.monotonic() - start)))
            grown = (log.stat().st_size - before) / 1024
            record.note("the log in 10 s", f"{grown:.1f} KiB", grown < 100)
    took = until(lambda: generate(target).status_code == 200, 20)
    record.note("/generate after they have gone", f"{took and round(took, 1)} s", took is not None)


@requests(9, "connections that never send")
def silent_ones(target: Target, record: Record) -> None:
    """They are closed in 60 s at most."""
    starts = [b"", b"GET / HTTP/1.1\r\nHost:", b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
    with contextlib.ExitStack() as stack:
        sockets = []
        for said in starts:
            one = stack.enter_context(target.socket())
            one.sendall(said)
            one.settimeout(75)
            sockets.append(one)
        start = time.monotonic()
        for said, one in sorted(zip(starts, sockets, strict=True), key=lambda pair: -len(pair[0])):
            try:
                got = one.recv(12) or b"closed"
            except OSError as error:
                got = type(error).__name__.encode()
            took = time.monotonic() - start
            name = said.splitlines()[0].decode() if said else "nothing sent"
            record.note(f"{name} …", f"{got.decode()} after {took:.0f} s", got != b"TimeoutError" and took < 70)


@processes(13, "two servers on one port")
def one_port(record: Record) -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "multilora",
            "serve",
            "--device",
            "cpu",
            "--port",
            str(port),
            *record.servers,
        ]
        logs = [Path(folder) / "1", Path(folder) / "2"]
        start = time.monotonic()
        both = []
        for log in logs:
            with log.open("wb") as file:
                both.append(subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True))
        try:
            took = until(lambda: any(one.poll() is not None for one in both), 180)
            codes = [one.poll() for one in both]
            lost = codes.index(next((c for c in codes if c is not None), None)) if took is not None else 0
            said = logs[lost].read_text().strip()
            good = (
                took is not None and codes[lost] not in (0, None) and "Traceback" not in said and "loaded" not in said
            )
            seconds = f"{time.monotonic() - start:.1f} s"
            record.note(
                "started together: one of them",
                f"exit {codes[lost]} after {seconds}: {said.splitlines()[-1][:90]}",
                good,
            )
            target = Target("127.0.0.1", port, both[1 - lost].pid)
            served = until(target.healthy, 180)
            record.note("the other one serves after", f"{served and round(served, 1)} s more", served is not None)
        finally:
            for one in both:
                one.terminate()
            for one in both:
                one.wait(60)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command[command.index("--port") + 1] = str(taken.getsockname()[1])
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        took = time.monotonic() - start
        line = done.stderr.strip().splitlines()[-1]
        good = done.returncode not in (0,) and "Traceback" not in done.stderr
        record.note(
            "a port that another program has", f"exit {done.returncode} after {took:.1f} s: {line[:90]}", good
        )


@processes(22, "a long TMPDIR, and what kill -9 leaves")
def long_folder(record: Record) -> None:
    with tempfile.TemporaryDirectory() as folder:
        long, short = Path(folder) / ("x" * (110 - len(folder) - 1)), Path(folder) / "short"
        long.mkdir()
        short.mkdir()
        command = [sys.executable, "-m", "multilora", "serve", "--device", "cpu", "--port", str(free_port())]
        env = os.environ | {"TMPDIR": str(long)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        good = done.returncode == 2 and "TMPDIR is too long" in done.stderr and "Traceback" not in done.stderr
        line = done.stderr.strip().splitlines()[-1]
        record.note("TMPDIR of 110 characters", f"exit {done.returncode}: {line[:90]}", good)
        with own_server(
            record.log, "--device", "cpu", "--enable-lora", *record.servers, env={"TMPDIR": str(short)}
        ) as target:
            record.expect("tensors", from_tensors(target, "t", Path(PATHS["json"])).status_code, 200)
            family = psutil.Process(target.pid).children(recursive=True)
            psutil.Process(target.pid).send_signal(signal.SIGKILL)
            _, alive = psutil.wait_procs(family, 20)
            record.expect("processes that outlive a kill -9", len(alive), 0)
        left = [path.name for path in short.iterdir() if path.name.startswith("multilora")]
        record.expect("files left by it", left, [])
