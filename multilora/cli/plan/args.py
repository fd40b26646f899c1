"""The command line of `multilora plan`. Called by `cli/parser.py`; `command.py` does the work."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from multilora.options import parse_size


@dataclass(frozen=True)
class PlanArgs:
    """A parsed command line. question: the fields of `planner.Workload` that were given."""

    command: str
    question: dict[str, Any]
    json: bool = False
    plot: str | None = None

    log_level = "warning"
    log_format = "text"


def add_commands(commands: Any, make_parser: dict[str, Any]) -> None:
    """Add `plan` to argparse's sub-commands. make_parser: the arguments that every parser is made with."""
    plan = commands.add_parser(
        "plan",
        help="what a GPU would serve of your adapters and traffic, where it breaks, which flag to set",
        description="How many adapters fit, tokens a second, first tokens, and the rate at which it breaks, by the "
        "engine's memory plan and a model of its steps calibrated on an H200; needs no GPU. Of the model only the "
        "config is read. Exit code 0: the rate is served in time; 1: it is not.",
        argument_default=argparse.SUPPRESS,
        **make_parser,
    )
    plan.add_argument("--model-path", "--model", metavar="PATH", required=True, help="local directory or hub id")
    plan.add_argument("--gpu", metavar="NAME", help="h200 (measured), h100, a100-80g, l40s, … (default: h200)")
    plan.add_argument("--tp-size", type=int, metavar="N", help="so many of them share the model (default: 1)")
    plan.add_argument("--adapters", type=int, metavar="N", help="how many there are, 0: none (default: 64)")
    plan.add_argument("--rank", type=int, metavar="N", help="of each (default: 16)")
    plan.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="what they act on (default: every linear layer)"
    )
    plan.add_argument("--rps", type=float, metavar="X", help="requests a second (default: 70 %% of the most)")
    plan.add_argument("--prompt", type=int, metavar="N", help="tokens of a prompt (default: 512)")
    plan.add_argument("--answer", type=int, metavar="N", help="tokens of an answer (default: 128)")
    plan.add_argument(
        "--skew", type=float, metavar="X", help="adapter i is asked for as 1/i^X (default: 0, all alike; 1: Zipf)"
    )
    plan.add_argument(
        "--first-token", type=float, metavar="SECONDS", help="99 of 100 first tokens within this (default: 1)"
    )
    plan.add_argument(
        "--host-bytes", type=parse_size, metavar="SIZE", help="host memory for adapters (default: enough)"
    )
    for flag, default in (("max-running-requests", 64), ("chunked-prefill-size", 2048), ("page-size", 16)):
        plan.add_argument(f"--{flag}", type=int, metavar="N", help=f"as of serve (default: {default})")
    plan.add_argument("--mem-fraction-static", type=float, metavar="X", help="as of serve (default: 0.9)")
    for flag in ("dtype", "kv-cache-dtype", "quantization"):
        plan.add_argument(f"--{flag}", metavar=flag.rpartition("-")[2].upper(), help="as of serve")
    plan.add_argument("--json", action="store_true", default=False, help="JSON instead of text")
    plan.add_argument("--plot", metavar="FILE", default=None, help="draw tokens and first tokens by rate, as SVG")
    plan.set_defaults(command="plan")


def parsed(namespace: argparse.Namespace) -> PlanArgs:
    """The arguments in argparse's result."""
    given = dict(vars(namespace))
    own = {field.name: given.pop(field.name) for field in dataclasses.fields(PlanArgs) if field.name != "question"}
    if "target_modules" in given:
        given["target_modules"] = tuple(given["target_modules"])
    return PlanArgs(question=given, **own)
