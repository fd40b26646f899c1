"""Soak a server: many clients and adapters, swaps, hang-ups, bad requests, killed processes.

    python -m scripts.soak [--seconds 600] [--adapters 200] [--clients 64] [--front-workers 2]

It starts `multilora serve` over the demo model. Meanwhile the engine and the loader are killed in turns, and of
several front processes one is killed or stopped. Counts are printed. The exit code is 1 unless every request had one
ending and it was right, every adapter answers rightly before and after, the arena's pages add up and none is left in
use, the front's memory stayed flat, and no descriptor and no file is left.
"""

import argparse
import asyncio
import logging
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx

from scripts.soak.clients import Clients
from scripts.soak.server import Server, started

FLAGS = (
    *("--enable-lora", "--max-loras-per-batch", "16", "--max-running-requests", "32"),
    *("--max-engine-restarts", "1000", "--max-queued-requests", "256"),
)
WARM_UP = 0.25  # part of the time after which memory should not grow
GROWTH = 0.1  # part of the front's memory
GROWTH_MIB = 48.0
IDLE_SECONDS = 60.0
RESTART_SECONDS = 300.0


class Report:
    """What was found wrong; says what was found."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def check(self, truth: bool, text: str) -> None:
        self.say(f"{'ok ' if truth else 'BAD'} {text}")
        if not truth:
            self.failed.append(text)


async def faults(server: Server, clients: Clients, arguments: argparse.Namespace, killed: list[str]) -> None:
    """Kill loader, engine and, of several, a front process in turns, at even intervals, the last one well before the
    end."""
    seconds, kills = arguments.seconds, arguments.kills
    kills = kills if kills is not None else max(2, int(seconds / 60))
    roles = ["loader", "engine"] + (["front"] if arguments.front_workers > 1 else [])
    for number in range(kills):
        await asyncio.sleep(0.8 * seconds / kills)
        role = roles[number % len(roles)]
        how = signal.SIGSTOP if role == "front" and killed.count("front") % 2 else signal.SIGKILL
        if role == "front":
            clients.front_ended_at = time.monotonic()
        if server.kill(role, how):
            killed.append(role)


async def soak(server: Server, arguments: argparse.Namespace, report: Report) -> None:
    limits = httpx.Limits(max_connections=arguments.clients + 8)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
        clients = Clients(http, arguments.adapters, arguments.seed, arguments.pause)
        await clients.load_all()
        report.say(f"{len(clients.adapters)} adapters loaded; {len(clients.expected)} answers known")
        report.check(await clients.check_all() == len(clients.adapters), "right answers before")
        await _idle(server)
        before, files = server.descriptors(), server.files()
        stop, killed, sizes = asyncio.Event(), list[str](), list[float]()
        tasks = [asyncio.create_task(clients.client(i, stop)) for i in range(arguments.clients)]
        end = time.monotonic() + arguments.seconds
        killer = asyncio.create_task(faults(server, clients, arguments, killed))
        while time.monotonic() < end:
            await asyncio.sleep(min(5.0, arguments.seconds / 20))
            sizes.append(server.front_mib())
        stop.set()
        await asyncio.gather(*tasks, killer)
        for ending, count in sorted(clients.endings.items()):
            report.say(f"{count:8d}  {ending}")
        report.say(f"{sum(clients.endings.values()):8d}  requests; killed: {' '.join(killed)}")
        report.check(not clients.wrong, f"every request had one right ending: {clients.wrong[:5]}")
        await _ready(http)
        report.check(await clients.check_all() == len(clients.adapters), f"right answers after {clients.wrong[-2:]}")
    await _idle(server)
    _after(server, report, before, files, sizes)


def _after(server: Server, report: Report, before: int, files: set[str], sizes: list[float]) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        pages = server.pages(http)
    parts = {use: n for use, n in pages.items() if use != "total"}
    report.check(sum(parts.values()) == pages["total"] and parts["kv"] == 0, f"pages add up, none in use: {pages}")
    warm, last = sizes[int(WARM_UP * len(sizes))], sizes[-1]
    report.check(
        last <= warm * (1 + GROWTH) + GROWTH_MIB, f"the front's memory: {warm:.0f} MiB, {last:.0f} MiB at last"
    )
    after = server.descriptors()
    report.check(after <= before + 2, f"the front's descriptors: {before} before, {after} after")
    left = server.files() - files
    report.check(not left, f"files left: {sorted(left)[:10]}")


async def _ready(http: httpx.AsyncClient) -> None:
    """Wait until requests are taken, and still are a moment later: a death takes a moment to be noticed."""
    end, times = time.monotonic() + RESTART_SECONDS, 0
    while times < 3:
        assert time.monotonic() < end, f"the engine was not back after {RESTART_SECONDS:g} s"
        await asyncio.sleep(0.5)
        times = times + 1 if (await http.get("/ready")).status_code == 200 else 0


async def _idle(server: Server) -> None:
    """Wait until nothing runs and the engine has said so."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        end = time.monotonic() + IDLE_SECONDS
        while time.monotonic() < end:
            await asyncio.sleep(1.5)
            with httpx.Client(base_url=server.url, timeout=60) as sync:
                pages = server.pages(sync)
            if pages["kv"] == 0 and (await http.get("/ready")).status_code == 200:
                return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--kills", type=int, help="of loader, engine and front, in turns (default: one a minute, at least 2)"
    )
    parser.add_argument("--front-workers", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two requests of a client")
    parser.add_argument("--seed", type=int, default=0)
    return run(parser.parse_args())


def run(arguments: argparse.Namespace) -> int:
    """The exit code."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="multilora-soak-") as folder:
        scratch = Path(folder, "tmp")
        scratch.mkdir()
        log = Path(folder, "log")
        try:
            with started(scratch, log, *FLAGS, "--front-workers", str(arguments.front_workers)) as server:
                asyncio.run(soak(server, arguments, report))
        except BaseException:
            sys.stderr.write(log.read_text(errors="replace")[-20_000:])
            raise
        left = list(scratch.iterdir())
        report.check(not left, f"files left when the server has stopped: {left}")
        if report.failed:
            sys.stderr.write(log.read_text(errors="replace")[-5_000:])
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
