"""The flags of `multilora keys add` and `hash`. Called by `parser.py`; `key_commands.py` does the work."""

import argparse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KeyArgs:
    """A parsed command line. command: "add" or "hash"; the rest is of `add`, in the words of the file."""

    command: str
    file: str | None
    key_id: str = ""
    tenant: str | None = None
    admin: bool = False
    pin: bool = False
    use: tuple[str, ...] | None = None
    see: tuple[str, ...] | None = None
    load: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None

    log_level = "warning"
    log_format = "text"


def add_commands(commands: Any, make_parser: dict[str, Any]) -> None:
    """Add `keys` to argparse's sub-commands. make_parser: the arguments that every parser is made with."""
    keys = commands.add_parser("keys", help="make keys for --auth-file: add, hash", **make_parser)
    kinds = keys.add_subparsers(metavar="COMMAND", required=True, dest="command")
    add = kinds.add_parser(
        "add",
        help="make a new key and write its hash into a file",
        description="Make a random key, write its hash and what it may do into FILE, and show the key, this once. "
        "FILE is made if there is none. A running server reads it again on SIGHUP.",
        **make_parser,
    )
    add.add_argument("file", metavar="FILE", help="the file of --auth-file")
    add.add_argument("key_id", metavar="NAME", help="the key's name, for logs and messages")
    add.add_argument("--tenant", metavar="NAME", help="whose key it is")
    add.add_argument("--admin", action="store_true", help="may do everything, instead of --tenant")
    add.add_argument("--pin", action="store_true", help="may pin adapters")
    for field, text in (
        ("use", "adapters that it may use, as sql-* (default: all that are its tenant's or shared)"),
        ("see", "adapters that lists show it (default: as --use)"),
        ("load", "names of adapters that it may load (default: none)"),
    ):
        add.add_argument(f"--{field}", nargs="*", metavar="PATTERN", help=text)
    for flag in ("requests-per-minute", "tokens-per-minute", "concurrency"):
        add.add_argument(f"--{flag}", type=int, metavar="N", help="default: no limit")
    hash_ = kinds.add_parser(
        "hash",
        help="the hash of a key that there is already",
        description="Read a key from stdin and write what stands for it in a file of keys.",
        **make_parser,
    )
    hash_.add_argument("file", metavar="FILE", nargs="?", help="use the salt of this file's keys")


def parsed(namespace: argparse.Namespace) -> KeyArgs:
    """The arguments in argparse's result."""
    fields: dict[str, Any] = vars(namespace)
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return KeyArgs(**fields | lists)
