"""Runs `multilora completion SHELL`: the script goes to stdout. Called by `__main__.py`."""

import sys

import shtab

from multilora.cli.completion.args import CompletionArgs
from multilora.cli.parser import make_parser


def run(args: CompletionArgs) -> int:
    """Print the script and return the exit code."""
    sys.stdout.write(shtab.complete(make_parser(), args.shell) + "\n")
    return 0
