"""The command line of `multilora demo`. Called by `parser.py`; `command.py` does the work."""

import argparse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DemoArgs:
    """A parsed command line."""

    command: str

    log_level = "warning"
    log_format = "text"


def add_commands(commands: Any, make_parser: dict[str, Any]) -> None:
    """Add `demo` to argparse's sub-commands. make_parser: the arguments that every parser is made with."""
    demo = commands.add_parser(
        "demo",
        help="start a server on the bundled model, run the documentation's examples, print the answers",
        description="Start `multilora serve` with the bundled model and its adapters on a free port, send it the "
        "documentation's LoRA examples over HTTP, check each status and answer, stop it. Exit code 0: everything was "
        "as it should be; 1: it says what was not, and shows the end of the server's log.",
        **make_parser,
    )
    demo.set_defaults(command="demo")


def parsed(namespace: argparse.Namespace) -> DemoArgs:
    """The arguments in argparse's result."""
    return DemoArgs(**vars(namespace))
