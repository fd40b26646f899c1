"""The command line: arguments in, `Config` out. The flags of `serve` are made from the options that `Config`
declares.

It owns flags and `--help`; `compat.py` lists the flags of SGLang's that are ignored with a warning. It starts
nothing. Called by `__main__.py`.
"""

import argparse
import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from multilora import __version__, logs
from multilora.cli import adapter_work as cli_adapter_work
from multilora.cli import adapters as cli_adapters
from multilora.cli import keys_args as cli_keys
from multilora.cli.adapter_work import AdapterWorkArgs
from multilora.cli.adapters import AdapterArgs
from multilora.cli.cluster import args as cli_cluster
from multilora.cli.cluster.args import ClusterArgs
from multilora.cli.compat import ALWAYS_ON, IGNORED, REFUSED
from multilora.cli.completion import args as cli_completion
from multilora.cli.completion.args import CompletionArgs
from multilora.cli.demo import args as cli_demo
from multilora.cli.demo.args import DemoArgs
from multilora.cli.doctor import args as cli_doctor
from multilora.cli.doctor.args import DoctorArgs
from multilora.cli.keys import add_keys
from multilora.cli.keys_args import KeyArgs
from multilora.cli.plan import args as cli_plan
from multilora.cli.plan.args import PlanArgs
from multilora.config import Config
from multilora.errors import ConfigError
from multilora.lora_path import LoraPath
from multilora.options import Option, options_of

__all__ = [
    "AdapterArgs",
    "AdapterWorkArgs",
    "ClusterArgs",
    "CompletionArgs",
    "DemoArgs",
    "DoctorArgs",
    "KeyArgs",
    "OtherArgs",
    "PlanArgs",
    "ServeArgs",
    "flags",
    "make_parser",
    "parse",
]

logger = logging.getLogger(__name__)

OtherArgs = AdapterArgs | AdapterWorkArgs | KeyArgs | DemoArgs | DoctorArgs | PlanArgs | ClusterArgs | CompletionArgs
"""What the command lines are parsed into but `serve`."""

FAMILIES: dict[str, tuple[str, Callable[[argparse.Namespace], OtherArgs]]] = {
    "inspect": ("adapters ", cli_adapters.parsed),
    "verify": ("adapters ", cli_adapters.parsed),
    **dict.fromkeys(cli_adapter_work.COMMANDS, ("adapters ", cli_adapter_work.parsed)),
    "add": ("keys ", cli_keys.parsed),
    "hash": ("keys ", cli_keys.parsed),
    "completion": ("", cli_completion.parsed),
    "demo": ("", cli_demo.parsed),
    "doctor": ("", cli_doctor.parsed),
    "plan": ("", cli_plan.parsed),
    "cluster": ("", cli_cluster.parsed),
}
"""What stands before a command, and what reads its arguments; `serve` has neither."""

_IGNORED = "ignored flags"  # the namespace's attribute for them; no option's name has a space


@dataclass(frozen=True)
class ServeArgs:
    """`multilora serve`: the options given, as typed, and the flags of SGLang's that are ignored."""

    options: dict[str, Any]
    ignored: tuple[str, ...]

    @property
    def log_level(self) -> str:
        """The level to log with while the options are still being checked."""
        level = self.options.get("log_level")
        return level if level in logs.LEVELS else "info"

    @property
    def log_format(self) -> str:
        """The same for the form of the lines."""
        form = self.options.get("log_format")
        return form if form in logs.FORMATS else "text"

    def config(self) -> Config:
        """The checked configuration. Warns of every ignored flag. Raises ConfigError."""
        for flag in self.ignored:
            logger.warning("%s has no effect here and is ignored", flag)
        return Config.make(**add_keys(self.options))


def parse(argv: Sequence[str]) -> ServeArgs | OtherArgs:
    """The parsed arguments. Raises ConfigError if they are wrong, SystemExit(0) after `--help` and `--version`."""
    namespace, unknown = make_parser().parse_known_args(argv)
    options = vars(namespace)
    if "command" in options:
        command = options["command"]
        family, parsed = FAMILIES[command]
        if unknown:
            raise ConfigError(f"unknown argument {unknown[0]!r}; see multilora {family}{command} --help")
        return parsed(namespace)
    if unknown:
        raise ConfigError(_unknown(unknown[0]))
    return ServeArgs(ignored=tuple(dict.fromkeys(options.pop(_IGNORED, ()))), options=options)


def flags() -> list[str]:
    """Every flag that has an effect, aliases included."""
    return [flag for opt in options_of(Config) for flag in (opt.flag, *opt.aliases)]


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError, so that only `__main__.py` writes errors and chooses exit codes."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


class _Ignore(argparse.Action):
    """The action of a flag of SGLang's that this server does not need: its name is noted, its values are dropped."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, _values: Any, flag: str | None = None) -> None:
        if flag not in ALWAYS_ON:
            setattr(namespace, _IGNORED, [*getattr(namespace, _IGNORED, ()), flag])


class _Refuse(argparse.Action):
    """The action of a flag of SGLang's that must not be ignored. Raises ConfigError."""

    def __call__(self, _parser: Any, _namespace: argparse.Namespace, _values: Any, flag: str | None = None) -> None:
        raise ConfigError(f"{flag}: {REFUSED[str(flag)]}")


def make_parser() -> argparse.ArgumentParser:
    """All commands and their flags, as argparse has them."""
    parser = _Parser(
        prog="multilora", description="Serve any number of LoRA adapters over one base model.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"multilora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a base model and its adapters over HTTP (`multilora serve --help` lists the flags)",
        description="Serve a base model and its adapters over HTTP. Without flags: the bundled demo model.",
        epilog="Sizes: 512M and 8GiB are powers of 1024, 8GB of 1000. "
        "Flags of SGLang that are not listed are ignored with a warning.",
        usage="multilora serve [FLAGS]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=_wide,
    )
    for family in (cli_adapters, cli_keys, cli_demo, cli_doctor, cli_plan, cli_cluster, cli_completion):
        family.add_commands(commands, {"allow_abbrev": False, "formatter_class": _wide})
    groups: dict[str, Any] = {}
    for opt in options_of(Config):
        group = groups.get(opt.group) or groups.setdefault(opt.group, serve.add_argument_group(opt.group))
        group.add_argument(opt.flag, *opt.aliases, dest=opt.name, help=_help(opt), **_kind(opt))
    _add_sglang_flags(serve)
    return parser


def _wide(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34, width=110)


def _add_sglang_flags(serve: argparse.ArgumentParser) -> None:
    for flag, nargs in IGNORED.items():
        serve.add_argument(flag, action=_Ignore, nargs=nargs, help=argparse.SUPPRESS)
    for flag in REFUSED:
        serve.add_argument(flag, action=_Refuse, help=argparse.SUPPRESS)
    for flag in ALWAYS_ON:
        serve.add_argument(flag, action=_Ignore, nargs=0, help=argparse.SUPPRESS)


def _kind(opt: Option) -> dict[str, Any]:
    """argparse's arguments for the option's value. What the value means is checked by `Config`."""
    if opt.type is bool:
        return {"action": argparse.BooleanOptionalAction if opt.default else "store_true"}
    if opt.choices:
        return {"type": opt.type, "metavar": opt.metavar or f"{{{','.join(map(str, opt.choices))}}}"}
    if opt.many:
        return {"action": "extend", "nargs": "*" if opt.type is LoraPath else "+", "metavar": opt.metavar}
    if opt.size:
        return {"metavar": "SIZE"}
    metavar = {int: "N", float: "X"}.get(opt.type) or opt.name.rpartition("_")[2].upper()
    return {"type": opt.type, "metavar": opt.metavar or metavar}


def _help(opt: Option) -> str:
    text = opt.help.replace("%", "%%")
    if opt.default is None or opt.default == () or opt.type is bool:
        return text
    return f"{text} (default: {opt.default})"


def _unknown(argument: str) -> str:
    flag = argument.partition("=")[0]
    if not flag.startswith("-"):
        return f"unexpected argument {argument!r}"
    near = difflib.get_close_matches(flag, [*flags(), *IGNORED], n=1)
    return f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see multilora serve --help")
