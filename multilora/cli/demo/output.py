"""What the demo shows: lines, and answers beside names. Called by `examples.py` and `command.py`."""

import sys
import textwrap

WIDTH = 84
MARGIN = 14


def write(text: str = "") -> None:
    """One line on stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """One indented line."""
    write(f"  {text}")


def row(name: str | None, text: str) -> None:
    """An answer in wrapped lines beside the adapter's name; None is the base model."""
    lines = textwrap.wrap(" ".join(text.split()), WIDTH) or ["(nothing)"]
    head = f"    {name or 'base':<8}  "
    write("\n".join((" " * MARGIN if i else head) + line for i, line in enumerate(lines)))
