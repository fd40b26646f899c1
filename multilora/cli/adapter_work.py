"""The flags of `multilora adapters merge`, `compose`, `convert`, `diff` and `bench`. Called by `adapters.py` and
`parser.py`; `adapter_tools/` does the work.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Any

from multilora.adapter_tools.methods import METHODS
from multilora.config import DEVICES, DTYPES
from multilora.errors import ConfigError


@dataclass(frozen=True)
class AdapterWorkArgs:
    """A parsed command line. command: one of `COMMANDS`; paths: adapters; weights: theirs, of compose."""

    command: str
    paths: tuple[str, ...]
    model_path: str | None = None
    out: str | None = None
    json: bool = False
    weights: tuple[float, ...] = ()
    method: str = "cat"
    rank: int | None = None
    density: float | None = None
    sign: str = "total"
    seed: int = 0
    alpha: float | None = None
    batch: tuple[int, ...] = (1, 8)
    prompt: int = 128
    steps: int = 32
    dtype: str = "auto"
    device: str = "auto"

    log_level = "warning"
    log_format = "text"


COMMANDS = ("merge", "compose", "convert", "diff", "bench")


def add_commands(kinds: Any, make_parser: dict[str, Any]) -> None:
    """Add them to the commands of `adapters`. make_parser: the arguments that every parser is made with."""
    make_parser = make_parser | {"argument_default": argparse.SUPPRESS}
    merge = kinds.add_parser(
        "merge",
        help="write the base model with the adapter in its weights",
        description="Write a checkpoint that is the base model with the adapter in its weights, as safetensors.",
        **make_parser,
    )
    compose = kinds.add_parser(
        "compose",
        help="make one adapter from several, by one of PEFT's methods",
        description="Make one adapter from several, as PEFT's add_weighted_adapter does. cat is exact; svd is the "
        "nearest of a lower rank; linear and the others are approximations.",
        **make_parser,
    )
    convert = kinds.add_parser(
        "convert",
        help="write another trainer's adapter as PEFT would",
        description="Write an adapter of kohya, Unsloth, Axolotl, MLX or llama.cpp (GGUF) as a directory of PEFT's. "
        "What cannot be one is refused by name.",
        **make_parser,
    )
    diff = kinds.add_parser(
        "diff",
        help="what changed between two versions of an adapter",
        description="Per module the size of the change relative to the old one, and fields of the config that "
        "differ. Exit code 0: they compute the same; 1: not.",
        **make_parser,
    )
    bench = kinds.add_parser(
        "bench",
        help="what an adapter costs on this machine",
        description="Bytes, loading time, and prompts and decode steps with the adapter beside the base model's.",
        **make_parser,
    )
    _add_arguments(merge, compose, convert, diff, bench)
    for parser in (merge, compose, convert, diff, bench):
        parser.add_argument("--json", action="store_true", help="JSON instead of text")


def _add_arguments(merge: Any, compose: Any, convert: Any, diff: Any, bench: Any) -> None:
    for parser in (merge, bench):
        parser.add_argument("path", metavar="PATH", help="directory or hub id of the adapter")
        parser.add_argument("--model-path", "--model", metavar="PATH", required=True, help="the base model")
    compose.add_argument("parts", nargs="+", metavar="PATH[=WEIGHT]", help="adapters, and their weights (default: 1)")
    compose.add_argument("--method", choices=METHODS, metavar="NAME", help=f"{', '.join(METHODS)} (default: cat)")
    compose.add_argument("--rank", type=int, metavar="N", help="svd: of the result (default: the largest)")
    compose.add_argument("--density", type=float, metavar="X", help="ties, dare, …: part of the numbers that is kept")
    compose.add_argument("--sign", choices=("total", "frequency"), metavar="NAME", help="ties: total or frequency")
    compose.add_argument("--seed", type=int, metavar="N", help="dare: of what is dropped (default: 0)")
    convert.add_argument("path", metavar="PATH", help="file or directory")
    convert.add_argument("--model-path", "--model", metavar="PATH", help="the base model: GGUF and kohya need it")
    convert.add_argument("--alpha", type=float, metavar="X", help="lora_alpha, where no file says it")
    diff.add_argument("paths", nargs=2, metavar="PATH", help="the old and the new version")
    for parser in (merge, compose, convert):
        parser.add_argument("--out", metavar="DIR", required=True, help="a directory that does not exist yet")
    bench.add_argument("--batch", nargs="+", type=int, metavar="N", help="requests at a time (default: 1 8)")
    bench.add_argument("--prompt", type=int, metavar="N", help="tokens of a prompt (default: 128)")
    bench.add_argument("--steps", type=int, metavar="N", help="decode steps of a run (default: 32)")
    bench.add_argument("--dtype", choices=("auto", *DTYPES), metavar="DTYPE", help="as of serve")
    bench.add_argument("--device", choices=("auto", *DEVICES), metavar="DEVICE", help="as of serve")


def parsed(namespace: argparse.Namespace) -> AdapterWorkArgs:
    """The arguments in argparse's result. Raises ConfigError for a weight that is no number."""
    fields: dict[str, Any] = dict(vars(namespace))
    if "parts" in fields:
        pairs = [_part(part) for part in fields.pop("parts")]
        fields["paths"], fields["weights"] = tuple(p for p, _ in pairs), tuple(w for _, w in pairs)
    elif "path" in fields:
        fields["paths"] = (fields.pop("path"),)
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return AdapterWorkArgs(**fields | lists)


def _part(text: str) -> tuple[str, float]:
    """PATH or PATH=WEIGHT; a path may hold a `=` if a weight follows."""
    path, found, weight = text.rpartition("=")
    if not found:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        raise ConfigError(f"{text!r}: expected PATH=WEIGHT") from None
    if not path or not math.isfinite(value):
        raise ConfigError(f"{text!r}: expected PATH=WEIGHT")
    return path, value
