"""The command line of `multilora completion`. Called by `cli/parser.py`; `command.py` does the work."""

import argparse
from dataclasses import dataclass
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")


@dataclass(frozen=True)
class CompletionArgs:
    """A parsed command line. shell: one of SHELLS."""

    command: str
    shell: str

    log_level = "error"
    log_format = "text"


def add_commands(commands: Any, make_parser: dict[str, Any]) -> None:
    """Add `completion` to argparse's sub-commands. make_parser: the arguments that every parser is made with."""
    completion = commands.add_parser(
        "completion",
        help="print the script that makes a shell complete commands and flags",
        description="Print a script for a shell. bash: multilora completion bash > "
        "~/.local/share/bash-completion/completions/multilora. zsh: multilora completion zsh > _multilora "
        "in a folder of $fpath.",
        **make_parser,
    )
    completion.add_argument("shell", choices=SHELLS, metavar=f"{{{','.join(SHELLS)}}}", help="the shell")
    completion.set_defaults(command="completion")


def parsed(namespace: argparse.Namespace) -> CompletionArgs:
    """The arguments in argparse's result."""
    return CompletionArgs(**vars(namespace))
