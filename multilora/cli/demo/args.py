"""The command line of `multilora demo`. Called by `parser.py`; `command.py` does the work."""

import argparse
from dataclasses import dataclass
from typing import Any

from multilora.errors import ConfigError


@dataclass(frozen=True)
class DemoArgs:
    """A parsed command line. adapters: the folder of the adapters on a model that is not the bundled one."""

    command: str
    model: str = "tiny"
    adapters: str | None = None

    log_level = "warning"
    log_format = "text"


def add_commands(commands: Any, make_parser: dict[str, Any]) -> None:
    """Add `demo` to argparse's sub-commands. make_parser: the arguments that every parser is made with."""
    demo = commands.add_parser(
        "demo",
        help="start a server on the bundled model, run the documentation's examples, print the answers; or let "
        "SmolLM2 and four adapters answer held-out questions",
        description="Start `multilora serve` with the bundled model and its adapters on a free port, send it the "
        "documentation's LoRA examples over HTTP, check each status and answer, stop it. Exit code 0: everything was "
        "as it should be; 1: it says what was not, and shows the end of the server's log. With `--model smollm2`: "
        "ask SmolLM2-135M-Instruct and four adapters on it (pirate voice, SQL from a schema, JSON from a note, "
        "French) what they were not trained on, all in one batch; exit code 2: a package or adapters are missing.",
        **make_parser,
    )
    demo.add_argument("--model", choices=("tiny", "smollm2"), default="tiny", help="tiny is bundled (default)")
    demo.add_argument("--adapters", metavar="DIR", default=None, help="adapters on smollm2: DIR/pirate, DIR/sql, …")
    demo.set_defaults(command="demo")


def parsed(namespace: argparse.Namespace) -> DemoArgs:
    """The arguments in argparse's result. Raises ConfigError."""
    if namespace.adapters is not None and namespace.model == "tiny":
        raise ConfigError("--adapters is for --model smollm2; the tiny model has adapters of its own")
    return DemoArgs(**vars(namespace))
