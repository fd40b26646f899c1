"""The flags of `multilora adapters inspect` and `verify`. Called by `parser.py`; `adapter_tools/` does the work."""

import argparse
from dataclasses import dataclass
from typing import Any

from multilora.cli import adapter_work
from multilora.config import DEVICES, DTYPES
from multilora.errors import ConfigError


@dataclass(frozen=True)
class AdapterArgs:
    """A parsed command line. command: "inspect" or "verify"; dtype: None for the command's own default."""

    command: str
    path: str
    model_path: str | None
    dtype: str | None
    json: bool
    page_size: int = 16
    prompts: tuple[str, ...] = ()
    tolerance: float | None = None
    device: str = "auto"

    log_level = "warning"
    log_format = "text"


def add_commands(commands: Any, make_parser: dict[str, Any]) -> None:
    """Add `adapters` to argparse's sub-commands. make_parser: the arguments that every parser is made with."""
    adapters = commands.add_parser(
        "adapters", help="work on adapters: inspect, verify, merge, compose, convert, diff, bench", **make_parser
    )
    kinds = adapters.add_subparsers(metavar="COMMAND", required=True, dest="command")
    inspect = kinds.add_parser(
        "inspect",
        help="what an adapter is, and whether a model can serve it",
        description="What an adapter is: method, rank and scaling of each module, sizes; with --model-path whether "
        "that model can serve it, and what it takes then. Exit code 0: yes, as far as is known; 1: no.",
        **make_parser,
    )
    verify = kinds.add_parser(
        "verify",
        help="compare with transformers and PEFT",
        description="Greedy answers and logprobs with this adapter, here and in transformers with PEFT, which must "
        "be installed. Exit code 0: the same; 1: not.",
        **make_parser,
    )
    adapter_work.add_commands(kinds, make_parser)
    for parser in (inspect, verify):
        parser.add_argument("path", metavar="PATH", help="directory or hub id, as a server takes it")
        parser.add_argument("--json", action="store_true", help="JSON instead of text")
    model = dict(metavar="PATH", dest="model_path", help="the base model: local directory or hub id")
    inspect.add_argument("--model-path", "--model", default=None, **model)
    inspect.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar=_choices(DTYPES),
        default=None,
        help="served in (default: the checkpoint's)",
    )
    inspect.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens in one page (default: 16)")
    verify.add_argument("--model-path", "--model", required=True, **model)
    verify.add_argument(
        "--dtype", choices=DTYPES, metavar=_choices(DTYPES), default=None, help="computed in (default: float32)"
    )
    verify.add_argument("--prompts", nargs="+", default=(), metavar="TEXT", help="prompts besides random token ids")
    verify.add_argument(
        "--tolerance", type=float, metavar="X", help="largest difference of a logprob (default: 1e-4 in float32)"
    )
    devices = ("auto", *DEVICES)
    verify.add_argument("--device", choices=devices, default="auto", metavar=_choices(devices), help="default: auto")


def parsed(namespace: argparse.Namespace) -> AdapterArgs:
    """The arguments in argparse's result. Raises ConfigError for numbers out of range."""
    fields = vars(namespace)
    args = AdapterArgs(**(fields | {"prompts": tuple(fields.get("prompts", ()))}))
    if args.page_size < 1:
        raise ConfigError(f"--page-size must be a positive integer, is {args.page_size}")
    if args.tolerance is not None and not args.tolerance >= 0:
        raise ConfigError(f"--tolerance must be 0 or more, is {args.tolerance}")
    return args


def _choices(values: tuple[str, ...]) -> str:
    return f"{{{','.join(values)}}}"
