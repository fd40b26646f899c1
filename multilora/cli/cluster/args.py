"""The command line of `multilora cluster`. Called by `cli/parser.py`; `command.py` does the work."""

import argparse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ClusterArgs:
    """A parsed command line. config: path of the YAML file; check: only read it."""

    command: str
    config: str
    check: bool = False

    log_level = "info"
    log_format = "text"


def add_commands(commands: Any, make_parser: dict[str, Any]) -> None:
    """Add `cluster` to argparse's sub-commands. make_parser: the arguments that every parser is made with."""
    cluster = commands.add_parser(
        "cluster",
        help="serve with several engines, on one machine or many, by Ray Serve (extra `ray`)",
        description="Start registry, replicas and ingresses on the Ray cluster that RAY_ADDRESS names, else on one "
        "of this machine alone, and serve until SIGTERM. Where an application runs already on that cluster, it is "
        "changed into this one, replica by replica.",
        **make_parser,
    )
    cluster.add_argument("--config", metavar="FILE", required=True, help="cluster.yaml, see docs/cluster.md")
    cluster.add_argument("--check", action="store_true", help="read the file, say what is wrong with it, and end")
    cluster.set_defaults(command="cluster")


def parsed(namespace: argparse.Namespace) -> ClusterArgs:
    """The arguments in argparse's result."""
    return ClusterArgs(**vars(namespace))
