"""The command line of `multilora doctor`. Called by `cli/parser.py`; `command.py` does the work."""

import argparse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DoctorArgs:
    """A parsed command line. model_path: the model to choose backends for; None: a Llama of head_dim 128."""

    command: str
    model_path: str | None = None
    json: bool = False

    log_level = "error"
    log_format = "text"


def add_commands(commands: Any, make_parser: dict[str, Any]) -> None:
    """Add `doctor` to argparse's sub-commands. make_parser: the arguments that every parser is made with."""
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, what the GPU can do, what will be slow here and why",
        description="Look at this machine as a server would: packages and extras, GPUs, the backends that `auto` "
        "means here, memory, limits, cache folders. Exit code 0: a server can run here, though perhaps slowly; 1: "
        "something is wrong, and the output says what to do.",
        **make_parser,
    )
    doctor.add_argument(
        "--model-path", "--model", metavar="PATH", default=None, help="choose backends for this model's config"
    )
    doctor.add_argument("--json", action="store_true", help="JSON instead of text")
    doctor.set_defaults(command="doctor")


def parsed(namespace: argparse.Namespace) -> DoctorArgs:
    """The arguments in argparse's result."""
    return DoctorArgs(**vars(namespace))
