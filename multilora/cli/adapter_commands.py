"""Runs `multilora adapters …`: arguments in, text or JSON on stdout, exit code out. Called by `__main__.py`."""

import dataclasses
import json
import sys
from typing import Any

from multilora.adapter_tools import render
from multilora.adapter_tools.inspect import inspect
from multilora.adapter_tools.verify import verify
from multilora.cli.adapters import AdapterArgs
from multilora.errors import AdapterError
from multilora.models.gguf import SUFFIX, converted


def run(args: AdapterArgs) -> int:
    """Run one command and return its exit code. 0: the adapter can be served, or computes the same as PEFT; 1: it
    does not, and the output says why. Raises ConfigError and ModelUnsupported."""
    return _inspect(args) if args.command == "inspect" else _verify(args)


def _inspect(args: AdapterArgs) -> int:
    report = inspect(args.path, _model(args, "bfloat16"), dtype=args.dtype or "auto", page_size=args.page_size)
    _write(dataclasses.asdict(report) if args.json else render.inspection(report))
    return 0 if report.ok else 1


def _model(args: AdapterArgs, dtype: str) -> str | None:
    """The base model's path; that of a GGUF file is the directory that it is converted into."""
    path = args.model_path
    return str(converted(path, args.dtype or dtype)) if path is not None and path.endswith(SUFFIX) else path


def _verify(args: AdapterArgs) -> int:
    model = _model(args, "float32")
    assert model is not None
    try:
        verdict = verify(
            args.path,
            model,
            prompts=args.prompts,
            dtype=args.dtype or "float32",
            device=args.device,
            tolerance=args.tolerance,
            progress=sys.stderr.isatty(),
        )
    except AdapterError as e:
        error = {"kind": e.kind, "message": e.message}
        _write({"ok": False, "path": args.path, "error": error} if args.json else render.refusal(args.path, error))
        return 1
    if args.json:
        facts = {"ok": verdict.ok, "base_ok": verdict.base_ok, "difference": verdict.difference}
        _write(facts | dataclasses.asdict(verdict))
    else:
        _write(render.verification(verdict))
    return 0 if verdict.ok else 1


def _write(what: str | dict[str, Any]) -> None:
    text = what if isinstance(what, str) else json.dumps(what, indent=2)
    sys.stdout.write(text + "\n")
