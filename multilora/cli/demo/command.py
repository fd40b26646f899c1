"""Runs `multilora demo`: the examples in their order, and what went wrong. Called by `__main__.py`."""

import sys
import tempfile
import time
from pathlib import Path

import httpx

from multilora.cli.demo import talking
from multilora.cli.demo.args import DemoArgs
from multilora.cli.demo.examples import EXAMPLES, Demo, DemoError
from multilora.cli.demo.output import say, write
from multilora.cli.demo.server import server, stop, wait_until_healthy

LOG_LINES = 40


def run(args: DemoArgs) -> int:
    """Run every example and return the exit code."""
    if args.model == "smollm2":
        return talking.run(args.adapters)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        try:
            _run_examples(log)
        except (DemoError, httpx.HTTPError) as e:
            tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
            sys.stderr.write(f"\nFAILED: {e}\n\nThe end of the server's log:\n" + "\n".join(tail) + "\n")
            return 1
    write("\nEverything answered as it should. The server stopped cleanly.")
    return 0


def _run_examples(log: Path) -> None:
    with server(log) as (url, process), httpx.Client(base_url=url, timeout=120) as http:
        say(f"starting {url} …")
        began = time.monotonic()
        wait_until_healthy(http, process)
        demo = Demo(http)
        say(f"up after {time.monotonic() - began:.1f} s: {demo.base} with {', '.join(demo.paths)}")
        for number, example in enumerate(EXAMPLES, 1):
            write(f"\n{number}. {example.__doc__}")
            example(demo)
        stop(process)
